"""Every file that export_model.py writes answers like the trained model, in transformers and in llama.cpp; or there is no file."""

import json
import re
import resource
import statistics
import sys
import urllib.request
from pathlib import Path

import gguf
import numpy
import pytest
import torch
import transformers as t
import xllamacpp
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Regex, normalizers, pre_tokenizers

import export_model
from common import encode, load_base, load_tokenizer
from conftest import call, make_model, make_tokenizer, run, train
from export_model import PROMPTS
from inference import conversation

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
STRANGE = ["  leading\n\n spaces\t and tabs ", "I'M 12345 don't you'LL x=3.14", "第577条，违约金为１２３元。🚀🦙", "a\u3000b\r\nc", "<|im_start|>x"]
QUESTIONS = ["试用期最长多久？", "房东不退押金怎么办？", "借钱不还怎么起诉？", "公司拖欠工资怎么办？", "离婚时房子怎么分？", "合同没签名有效吗？", "被狗咬了找谁赔？", "网购假货怎么赔？"]


def tokenizer_of(kind):
    """A tokenizer that cuts words as the real ones of its family do."""
    if kind == "mistral":
        return make_tokenizer("llama2")
    tokenizer = make_tokenizer("llama3" if kind in ("llama", "smollm") else "qwen")
    number = r"\p{N}{1,3}" if kind == "llama" else r"\p{N}"
    words = [pre_tokenizers.Split(Regex(LETTERS + number + REST), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits if kind == "smollm" else words)
    if kind == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def tiny_model(kind, folder, layers=2, **options):
    """A tiny random model of the family `kind` with its tokenizer, at `folder`: llama3 rope, GQA, biases, q/k norms, tied and untied between them."""
    tokenizer = tokenizer_of(kind)
    small = {"vocab_size": len(tokenizer) + 3, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.12, "bos_token_id": tokenizer.bos_token_id,
             "eos_token_id": tokenizer.eos_token_id, **options}
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}
    config = {"llama": lambda: t.LlamaConfig(**small, rope_parameters=llama3, tie_word_embeddings=True),
              "smollm": lambda: t.LlamaConfig(**small, attention_bias=True),
              "mistral": lambda: t.MistralConfig(**small, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
              "qwen2": lambda: t.Qwen2Config(**small), "qwen3": lambda: t.Qwen3Config(**small, head_dim=24, tie_word_embeddings=True)}[kind]()
    torch.manual_seed(1)
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_adapter(base, folder, **options):
    """A LoRA of `base` at `folder`, with numbers as after a training."""
    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(load_base(base, "cpu", torch.float32), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return str(folder)


def with_adapter(base, adapter):
    return PeftModel.from_pretrained(load_base(base, "cpu", torch.float32), adapter).eval()


def export(base, adapter, folder, *args, code=0):
    call("export_model.py", "--base_model", base, "--lora_weights", adapter, "--output_dir", folder, *args, code=code)
    return Path(folder)


def greedy(model, ids, steps):
    inputs = torch.tensor([ids])
    return model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=steps, do_sample=False, eos_token_id=None,
                          pad_token_id=0)[0, len(ids):].tolist()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """llama.cpp's threads wait for each other in a loop, which takes minutes on a machine that has other work."""
    original = xllamacpp.CommonParams

    def params():
        made = original()
        made.cpuparams.n_threads = made.cpuparams_batch.n_threads = 1
        return made

    xllamacpp.CommonParams = params
    yield
    xllamacpp.CommonParams = original


class LlamaCpp:
    """llama.cpp's server, in this process, in full precision."""

    def __init__(self, path, adapter=None):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(path), 1024, 1, False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            params.lora_adapters = [lora]
        self.server = xllamacpp.Server(params)

    def post(self, route, **body):
        request = urllib.request.Request(self.server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request))

    def ids(self, text, special=False):
        return self.post("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]

    def answer(self, ids, steps):
        return self.post("/completion", prompt=ids, n_predict=steps, temperature=0, samplers=["temperature"], ignore_eos=False, return_tokens=True)["tokens"]

    def log_probabilities(self, ids, plain):
        """{token: log-probability} of the ten likeliest; `plain`, a whole character, is forced so that they are always told."""
        found = self.post("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=10, logit_bias=[[plain, 1e9]])
        return {token["id"]: token["logprob"] for token in found["completion_probabilities"][0]["top_logprobs"]}


def compare_with_llama_cpp(model, tokenizer, llama_cpp, prompts, steps=32):
    """(equal tokens of each greedy answer, differences of the log-probabilities at its start, in its middle and at its end)."""
    equal, differences, plain = [], [], tokenizer("a", add_special_tokens=False).input_ids[-1]
    for ids in prompts:
        answer = greedy(model, ids, steps)
        theirs = llama_cpp.answer(ids, steps)
        same = sum(a == b for a, b in zip(answer, theirs))
        ended = len(theirs) < steps and not set(tokenizer.all_special_ids).isdisjoint(answer[len(theirs) - 1:len(theirs) + 1])
        equal.append(steps if ended and same == len(theirs) else same)
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1:].log_softmax(-1)
        for n in (0, steps // 2, steps):
            differences += [abs(value - float(expected[n, token])) for token, value in llama_cpp.log_probabilities(ids + answer[:n], plain).items()]
    return equal, differences


# ---- Merging ----

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(base, adapter, exported folder) of a tiny Llama with llama3 rope, in every precision."""
    folder = tmp_path_factory.mktemp("llama")
    base = tiny_model("llama", folder / "base")
    adapter = random_adapter(base, folder / "adapter")
    return base, adapter, export(base, adapter, folder / "out", "--gguf", *export_model.GGUF, "--system", '说"是"。\n\n第二行 \\n', "--temperature", 0.7)


def test_the_merged_model_is_a_plain_one_that_answers_like_base_and_adapter(llama):
    base, adapter, folder = llama
    ids = torch.tensor([encode(load_tokenizer(base), conversation("试用期多久？"))[0]])
    with torch.inference_mode():
        wanted, found = with_adapter(base, adapter)(ids).logits, load_base(str(folder), "cpu", torch.float32)(ids).logits
        before = load_base(base, "cpu", torch.float32)(ids).logits
    assert torch.allclose(wanted, found, atol=1e-4) and not torch.allclose(wanted, before, atol=0.1)
    assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name]
    assert load_tokenizer(str(folder))("试用期").input_ids == load_tokenizer(base)("试用期").input_ids


def test_readers_of_old_and_of_new_configs_find_the_same_rope(llama):
    config = json.loads((llama[2] / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_scaling"]["rope_type"] == "llama3" and config["rope_scaling"]["factor"] == 8.0 and "rope_theta" not in config["rope_scaling"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    words = json.loads((llama[2] / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in words and words["chat_template"]


def test_the_template_carries_the_date_of_the_training(llama):
    assert "26 Jul 2024" in load_tokenizer(str(llama[2])).chat_template and "strftime_now" not in load_tokenizer(str(llama[2])).chat_template


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_merge_only_writes_the_asked_precision_and_nothing_else(llama, tmp_path, dtype, capsys):
    folder = export(*llama[:2], tmp_path / "half", "--merge_only", "--dtype", dtype)
    assert {str(x.dtype) for x in load_file(folder / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert not [p for p in folder.iterdir() if p.suffix == ".gguf" or p.name == "Modelfile"]
    assert "通过" in (out := capsys.readouterr().out) and dtype in out and out.endswith(f"{folder}\n")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_of_a_quantised_base_is_merged_into_what_it_was_trained_on(llama, tmp_path, bits):
    folder = export(*llama[:2], tmp_path / bits, "--merge_only", "--quantization", bits)
    merged, plain = load_file(folder / "model.safetensors"), load_file(llama[2] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert 0.001 < (merged[name] - plain[name]).norm() / plain[name].norm() < 0.2


# ---- GGUF ----

@pytest.mark.parametrize("kind", ["llama", "smollm", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_cuts_renders_and_answers_like_transformers(kind, llama, tmp_path):
    base = tiny_model(kind, tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    folder = export(base, adapter, tmp_path / "out", "--gguf", "f32", "f16")
    model, tokenizer = load_base(str(folder), "cpu", torch.float32), load_tokenizer(str(folder))
    prompts = [encode(tokenizer, conversation(question))[0] for question in PROMPTS[:3]]
    for precision in ("f32", "f16"):
        llama_cpp = LlamaCpp(folder / f"model-{precision}.gguf")
        assert [llama_cpp.ids(text) for text in STRANGE] == [tokenizer(text, add_special_tokens=False).input_ids for text in STRANGE]
        for messages in (conversation("你好"), conversation("你好", "简短。"), [*conversation("a"), {"role": "assistant", "content": "b"}, *conversation("c")]):
            text = llama_cpp.post("/apply-template", messages=messages)["prompt"]
            assert llama_cpp.ids(text, special=True) == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        equal, differences = compare_with_llama_cpp(model, tokenizer, llama_cpp, prompts)
        # with f16 weights llama.cpp rounds what it multiplies them with to f16, too
        assert min(equal) >= 31 and max(differences) < (1e-3 if precision == "f32" else 1e-2), (equal, max(differences), statistics.fmean(differences))
        assert statistics.fmean(differences) < (1e-5 if precision == "f32" else 2e-3)
        print("MEASURED", kind, precision, equal, max(differences), statistics.fmean(differences))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_f16_rounds_log_probabilities_by_less_than_a_thousandth_where_weights_have_their_usual_size(kind, tmp_path):
    base = tiny_model(kind, tmp_path / "base", initializer_range=0.02)
    folder = export(base, random_adapter(base, tmp_path / "adapter"), tmp_path / "out", "--gguf", "f16")
    model, tokenizer = load_base(str(folder), "cpu", torch.float32), load_tokenizer(str(folder))
    prompts = [encode(tokenizer, conversation(question))[0] for question in PROMPTS[:3]]
    equal, differences = compare_with_llama_cpp(model, tokenizer, LlamaCpp(folder / "model-f16.gguf"), prompts)
    assert min(equal) >= 31 and max(differences) < 1e-3, (equal, max(differences))


def test_every_tensor_of_the_file_is_the_tensor_of_the_model(tmp_path):
    base = tiny_model("smollm", tmp_path / "base")  # q and k with biases, of which the rows are reordered, too
    call("export_model.py", "--base_model", base, "--use_original_model", "--output_dir", tmp_path / "out", "--gguf", "f32")
    weights = {name: x.numpy() for name, x in load_file(tmp_path / "out" / "model.safetensors").items()}
    found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf").tensors}
    assert len(found) == len(weights)
    names = {"embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for name, wanted in weights.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        old = next(key for key in sorted(names, key=len, reverse=True) if key in name)
        new = (f"blk.{layer[1]}." if layer else "") + names[old] + "." + name.rpartition(".")[2]
        if names[old] in ("attn_q", "attn_k"):  # of each head of 16, row i and row i + 8 turn together and stand side by side
            heads = len(wanted) // 16
            wanted = wanted[[16 * head + 8 * half + i for head in range(heads) for i in range(8) for half in range(2)]]
        assert numpy.array_equal(found[new], wanted), name


def test_small_types_are_smaller_and_close_to_the_model(llama):
    sizes = {}
    for kind in export_model.GGUF:
        reader = gguf.GGUFReader(llama[2] / f"model-{kind}.gguf")
        sizes[kind] = sum(tensor.n_bytes for tensor in reader.tensors)
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert types["blk.0.ffn_up.weight"] == kind.upper() and types["blk.0.attn_norm.weight"] == "F32"
        assert types["token_embd.weight"] == ("Q8_0" if kind in ("q5_0", "q4_0") else kind.upper())  # it is the head here
        assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]
    assert sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"] > sizes["q5_0"] > sizes["q4_0"]


def test_k_quants_have_llama_cpps_layout_and_it_answers_from_them(tmp_path, capsys):
    wide = tiny_model("llama", tmp_path / "base", layers=8, hidden_size=256, intermediate_size=512)
    call("export_model.py", "--base_model", wide, "--use_original_model", "--gguf", "q4_k_m", "q5_k_m", "q6_k", "--output_dir", tmp_path / "out")
    assert capsys.readouterr().out.count("llama.cpp：8/8 个提示词切得一样") == 3  # it has read the file, and answered
    for kind, number in (("q4_k_m", 15), ("q5_k_m", 17), ("q6_k", 18)):
        reader = gguf.GGUFReader(tmp_path / "out" / f"model-{kind}.gguf")
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert reader.get_field("general.file_type").contents() == number and types["token_embd.weight"] == "Q6_K" and types["output_norm.weight"] == "F32"
        few = kind.removesuffix("_m").upper()
        assert [types[f"blk.{i}.ffn_down.weight"] for i in range(8)] == ["Q6_K" if i in (0, 3, 6, 7) else few for i in range(8)]
        assert all(types[f"blk.{i}.attn_v.weight"] == types[f"blk.{i}.ffn_down.weight"] and types[f"blk.{i}.ffn_up.weight"] == few for i in range(8))
    narrow = tiny_model("qwen2", tmp_path / "narrow")  # 64 wide, so the blocks of 32 take over
    types = {name: kind.name for name, _, kind, _ in export_model.model_tensors(Path(narrow), t.AutoConfig.from_pretrained(narrow), "q4_k_m")}
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_up")} == {"Q5_0"} and types["output.weight"] == "Q8_0"


def test_without_libgguf_k_quants_are_refused_with_the_commands_that_make_them(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libgguf", None)
    call("export_model.py", "--base_model", llama[0], "--lora_weights", llama[1], "--gguf", "q4_k_m", "--output_dir", tmp_path / "x", code=2)
    said = capsys.readouterr().err
    assert "pip install libgguf" in said and "ollama create 名字 -q q4_K_M" in said and not list(tmp_path.iterdir())


def test_rows_that_are_no_multiple_of_a_block_stay_in_half_precision(tmp_path):
    base = make_model(tmp_path / "base", "qwen3")  # the output of its attention is 96 wide
    config = t.AutoConfig.from_pretrained(base)
    types = {name: kind.name for name, _, kind, _ in export_model.model_tensors(Path(base), config, "q4_0")}
    assert types["blk.0.attn_output.weight"] == "Q4_0"
    config.tie_word_embeddings = True
    assert {name: kind.name for name, _, kind, _ in export_model.model_tensors(Path(base), config, "q4_0")}["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize("kind,options", [("llama", {"use_rslora": True}), ("qwen3", {"target_modules": ["q_proj", "v_proj"]})])
def test_base_and_adapter_in_llama_cpp_answer_like_base_and_adapter(tmp_path, kind, options):
    base = tiny_model(kind, tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", **options)
    call("export_model.py", "--base_model", base, "--use_original_model", "--output_dir", tmp_path / "out", "--gguf", "f32")
    folder = export(base, adapter, tmp_path / "lora", "--adapter_gguf")
    assert [path.name for path in folder.iterdir()] == ["adapter.gguf"]
    tokenizer = load_tokenizer(base)
    prompts = [encode(tokenizer, conversation(question))[0] for question in PROMPTS[:3]]
    equal, differences = compare_with_llama_cpp(with_adapter(base, adapter), tokenizer, LlamaCpp(tmp_path / "out" / "model-f32.gguf", folder / "adapter.gguf"), prompts)
    assert min(equal) >= 31 and max(differences) < 1e-3
    without, _ = compare_with_llama_cpp(with_adapter(base, adapter), tokenizer, LlamaCpp(tmp_path / "out" / "model-f32.gguf"), prompts)
    assert max(without) < 31


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 3}},
                                     {"lora_bias": True}])
def test_an_adapter_that_llama_cpp_cannot_express_exits_4_and_leaves_nothing(tmp_path, capsys, options):
    base = tiny_model("qwen2", tmp_path / "base")
    export(base, random_adapter(base, tmp_path / "adapter", **options), tmp_path / "out", "--adapter_gguf", code=4)
    assert "去掉 --adapter_gguf" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ---- Refusals, and what is left behind ----

@pytest.mark.parametrize("flag", ["--merge_only", "--adapter_gguf"])
def test_virtual_tokens_can_be_neither_merged_nor_converted(tmp_path, capsys, flag):
    base = tiny_model("llama", tmp_path / "base")
    get_peft_model(t.AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(tmp_path / "adapter")
    export(base, tmp_path / "adapter", tmp_path / "out", flag, code=4)
    assert "虚拟 token" in (error := capsys.readouterr().err) and "inference.py --lora_weights" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_ia3_merges_and_is_no_lora_for_llama_cpp(tmp_path, capsys):
    base = tiny_model("llama", tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(t.AutoModelForCausalLM.from_pretrained(base), IA3Config(task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        p.data.add_(0.1 * torch.randn_like(p) if "ia3_l" in name else 0)
    model.save_pretrained(tmp_path / "adapter")
    export(base, tmp_path / "adapter", tmp_path / "lora", "--adapter_gguf", code=4)
    assert "去掉 --adapter_gguf" in capsys.readouterr().err
    export(base, tmp_path / "adapter", tmp_path / "out", "--merge_only")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        merged = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        assert (merged - model.eval()(ids).logits).abs().max() < 1e-3
        with model.disable_adapter():
            assert (merged - model(ids).logits).abs().max() > 1e-2

def test_an_unknown_architecture_exits_4_with_its_name_and_leaves_nothing(tmp_path, capsys):
    base = make_model(tmp_path / "base", "gpt2")
    call("export_model.py", "--base_model", base, "--use_original_model", "--output_dir", tmp_path / "out", code=4)
    assert "GPT2LMHeadModel" in (error := capsys.readouterr().err) and "--merge_only" in error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    call("export_model.py", "--base_model", base, "--use_original_model", "--output_dir", tmp_path / "out", "--merge_only")


@pytest.mark.parametrize("change", ["pre_tokenizer", "normalizer"])
def test_an_unknown_tokenizer_exits_4_with_its_rules_and_leaves_nothing(tmp_path, capsys, change):
    base = tiny_model("llama", tmp_path / "base")
    tokenizer = load_tokenizer(base)
    other = {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False)]),
             "normalizer": normalizers.Lowercase()}
    setattr(tokenizer.backend_tokenizer, change, other[change])
    tokenizer.save_pretrained(base)
    call("export_model.py", "--base_model", base, "--use_original_model", "--output_dir", tmp_path / "out", code=4)
    assert (r"\w+" if change == "pre_tokenizer" else "?") in (error := capsys.readouterr().err) and "--merge_only" in error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def spoil_rows(monkeypatch):
    original = export_model.gguf_weight
    monkeypatch.setattr(export_model, "gguf_weight", lambda config, name: (original(config, name)[0], lambda x: x))


def spoil_merge(monkeypatch):
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)


def spoil_numbers(monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, x, write=gguf.GGUFWriter.write_tensor_data: write(self, x[::-1].copy()))


def spoil_tokenizer(monkeypatch):
    original = export_model.gguf_header

    def header(config, tokenizer):
        made = original(config, tokenizer)
        return made | {"token_merges": made["token_merges"][:5]}

    monkeypatch.setattr(export_model, "gguf_header", header)


@pytest.mark.parametrize("spoil,name", [(spoil_rows, "model-f32.gguf"), (spoil_merge, "model.safetensors"), (spoil_numbers, "model-f32.gguf"),
                                        (spoil_tokenizer, "model-f32.gguf")])
def test_a_failed_check_exits_4_and_removes_every_file(llama, tmp_path, monkeypatch, capsys, spoil, name):
    with monkeypatch.context() as patch:
        spoil(patch)
        export(*llama[:2], tmp_path / "out", "--gguf", "f32", code=4)
    out, err = capsys.readouterr()
    assert f"{name} 没有通过核对" in err and "不通过" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [100_000, 700_000])  # in the middle of the merged model, and of a GGUF file
def test_a_full_disk_exits_6_and_leaves_nothing(llama, tmp_path, limit):
    base = tiny_model("qwen2", tmp_path / "base", layers=5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = run("export_model.py", "--base_model", base, "--use_original_model", "--output_dir", tmp_path / "out", "--gguf", "f32", "--dtype", "float16", code=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "磁盘满了" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_ctrl_c_leaves_nothing_and_a_killed_export_no_final_name(llama, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_model, "write_gguf", stop)
        with pytest.raises(KeyboardInterrupt):
            export(*llama[:2], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / ".tmp-out").mkdir()  # as kill -9 leaves it
    (tmp_path / ".tmp-out" / "model-00007-of-00009.safetensors").write_bytes(b"half")
    export(*llama[:2], tmp_path / "out", "--merge_only")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").glob("model-0*"))


def test_nothing_is_overwritten_and_slips_exit_2(llama, tmp_path, capsys):
    for words, args in (("已经存在", ["--output_dir", llama[2]]), ("--gguf", ["--gguf", "q4_k_x"]), ("SYSTEM", ["--system", 'a """ b']), ("SYSTEM", ["--system", "a\u3000b"]),
                        ("--merge_only", ["--gguf", "f16", "--merge_only"])):
        call("export_model.py", "--base_model", llama[0], "--lora_weights", llama[1], *(args if "--output_dir" in args else ["--output_dir", tmp_path / "x", *args]), code=2)
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- The Modelfile ----

def parse_modelfile(text):
    """[(instruction, value)] of a Modelfile by https://docs.ollama.com/modelfile: one instruction a line, any case, # comments, values in
    quotation marks or in three of them, which may span lines; PARAMETER and MESSAGE have a name before the value."""
    found, at = [], 0
    line = re.compile(r'[ \t]*(?:#[^\n]*|([A-Za-z]+)[ \t]+(?:"""(.*?)"""|([^\n]*)))?[ \t]*(?:\n|$)', re.DOTALL)
    parameter = re.compile(r'[ \t]*PARAMETER[ \t]+(\w+)[ \t]+(?:"([^\n]*)"|([^\n"][^\n]*))\n', re.IGNORECASE)
    while at < len(text):
        if match := parameter.match(text, at):
            found.append((f"parameter {match[1].lower()}", match[2] if match[2] is not None else match[3].strip()))
        else:
            match = line.match(text, at)
            assert match and (match[1] is None or match[1].lower() in ("from", "template", "system", "adapter", "license", "message", "requires")), text[at:at + 80]
            found += [(match[1].lower(), match[2] if match[2] is not None else match[3].strip())] if match[1] else []
        at = match.end()
    return found


def render_go(template, messages):
    """What a Go template gives that has only what ours have: a range over the messages, comparisons joined by `and`, strings, and $last."""
    before, body, after = re.fullmatch(r'\{\{ \$last := "" \}\}()\{\{ range \.Messages \}\}(.*)\{\{ \$last = \.Role \}\}\{\{ end \}\}(.*)', template, re.DOTALL).groups()
    case = re.compile(r'\{\{ if and \(eq \$last "(\w*)"\) \(eq \.Role "(\w+)"\) \}\}(?:\{\{ ("(?:[^"\\]|\\.)*") \}\})?\{\{ end \}\}')
    assert case.sub("", body) == "{{ .Content }}"

    def unquote(text):
        return json.loads(re.sub(r"\\U([0-9a-f]{8})", lambda m: json.dumps(chr(int(m[1], 16)))[1:-1], text or '""'))

    text, last = before, ""
    for message in messages:
        text += "".join(unquote(string) for a, b, string in case.findall(body) if (a, b) == (last, message["role"])) + message["content"]
        last = message["role"]
    return text + unquote(re.fullmatch(r"(?:\{\{ (.*) \}\})?", after, re.DOTALL)[1])


TALKS = [conversation("一"), conversation("一", "系统"), [*conversation("一", "系统"), {"role": "assistant", "content": "二"}, *conversation("三")]]
ODD = '{% for m in messages %}{{ "<<" + m["role"] + ">>\u3000\\"\\"\\" {{ .Content }} \\\\n\\n" + m["content"] + "</s>\\t" }}{% endfor %}{% if add_generation_prompt %}<<回答>>{% endif %}'
MOVING = "{% for m in messages %}{% if not loop.last or m.role != 'user' %}{{ m.content }}{% else %}{{ messages[0].content }}[{{ m.content }}]{% endif %}{% endfor %}"
THINKING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n" \
           "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"


def test_the_modelfile_is_what_its_documentation_asks_for(llama):
    found = parse_modelfile((llama[2] / "Modelfile").read_text(encoding="utf-8"))
    values = dict(found)
    assert values["from"] == "./model-f32.gguf" and (llama[2] / values["from"]).is_file()
    assert values["system"] == '说"是"。\n\n第二行 \\n'
    assert ("parameter stop", "<|eot_id|>") in found and values["parameter temperature"] == "0.7" and values["parameter num_ctx"] == "512"


@pytest.mark.parametrize("name,template", [("llama", None), ("mistral", None), ("qwen2", None), ("qwen3", ODD), ("qwen3", THINKING)])
def test_the_go_template_writes_what_the_chat_template_writes(name, template):
    tokenizer = tokenizer_of(name)
    trained = template or tokenizer.chat_template
    tokenizer.chat_template = export_model.serving_template(trained)
    text = export_model.modelfile("x.gguf", tokenizer, "", [1], {}, "")
    for messages in TALKS[:1] if name == "mistral" else TALKS:  # this one has no place for a system prompt
        if name != "mistral":
            assert render_go(dict(parse_modelfile(text))["template"], messages) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = encode(tokenizer, messages)[0]
        tokenizer.chat_template = trained
        assert encode(tokenizer, messages)[0] == ids
        tokenizer.chat_template = export_model.serving_template(trained)
    if name == "llama":
        assert text != export_model.modelfile("x.gguf", tokenizer, tokenizer.bos_token, [1], {}, "") and text.count(tokenizer.bos_token) == 2


def test_a_template_that_moves_its_contents_is_left_to_llama_cpp():
    tokenizer = tokenizer_of("qwen2")
    tokenizer.chat_template = MOVING
    assert "template" not in dict(parse_modelfile(export_model.modelfile("x.gguf", tokenizer, "", [1], {}, "")))


# ---- The demo model ----

def test_the_demo_model_with_a_trained_adapter_answers_the_same_in_llama_cpp(demo, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_model, "PROMPTS", QUESTIONS)
    monkeypatch.setattr(export_model, "STEPS", 8)
    adapter = train(demo, data, tmp_path / "run", "--max_steps", 2, "--max_length", 64, "--lora_dropout", 0, "--val_ratio", 0) / "final_model"
    call("export_model.py", "--lora_weights", adapter, "--gguf", "f16", "q8_0", "--output_dir", tmp_path / "out")
    same = re.findall(r"llama.cpp：8/8 个提示词切得一样（要求全部），(\d)/8", capsys.readouterr().out)
    tokenizer, config, model = load_tokenizer(demo), t.AutoConfig.from_pretrained(demo), with_adapter(demo, str(adapter))
    export_model.write_gguf(tmp_path / "adapter.gguf", config, *export_model.adapter_parts(str(adapter), config))
    prompts = [encode(tokenizer, conversation(question))[0] for question in QUESTIONS]
    answers = [greedy(model, ids, 8) for ids in prompts]
    for kind in ("f16", "q8_0"):
        export_model.write_gguf(tmp_path / "base.gguf", config, export_model.gguf_header(config, tokenizer), export_model.model_tensors(Path(demo), config, kind))
        llama_cpp = LlamaCpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
        same.append(sum(llama_cpp.answer(ids, 8) == answer for ids, answer in zip(prompts, answers)))
    print("MEASURED f16 and q8_0 merged, then base + adapter:", same)
    merged_f16, merged_q8_0, adapter_f16, adapter_q8_0 = map(int, same)
    assert (merged_f16, adapter_f16) == (8, 8) and min(merged_q8_0, adapter_q8_0) >= 7


def test_the_modelfile_has_the_sampling_flags(llama):
    words = (llama[2] / "Modelfile").read_text(encoding="utf-8")
    assert all(f"PARAMETER {line}\n" in words for line in ("temperature 0.7", "top_p 0.9", "top_k 50", "repeat_penalty 1.0"))


def test_two_adapters_and_a_broken_config_are_refused(llama, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{", encoding="utf-8")
    call("export_model.py", "--lora_weights", tmp_path / "adapter", "--output_dir", tmp_path / "out", code=4)
    assert "adapter_config.json" in capsys.readouterr().err
    call("export_model.py", "--base_model", llama[0], "--lora_weights", llama[1], "--lora_weights", llama[1], "--output_dir", tmp_path / "out", code=2)
    assert "一次导出一个" in capsys.readouterr().err and not (tmp_path / "out").exists()
