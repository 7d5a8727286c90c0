"""把 LoRA 合并成普通模型，转换成 GGUF，写好 Ollama 的 Modelfile，并核对写出来的每个文件。

  python export_model.py                                       # output/ 里最新的 LoRA → 合并的模型、q8_0 的 GGUF、Modelfile
  python export_model.py --gguf f16 q4_0 --output_dir my_model # 几种精度；--merge_only 只合并，--adapter_gguf 只转换 LoRA
  cd my_model && ollama create my-model && ollama run my-model

读：LoRA（默认最新的 output/*/final_model）和它的基础模型。写：--output_dir，默认是 LoRA 旁边的 export/。
不用编译 llama.cpp；装了 xllamacpp 就让 llama.cpp 也答一遍。有一项核对不通过就一个文件也不留（退出码 4）。
"""

import importlib.util
import json
import re
import shutil
from pathlib import Path

from common import TEMPLATE_DATE, encode, end_token_ids, fail, find_model, load_base, load_tokenizer, parse_args, pick_device, run_script
from inference import conversation, find_adapter, load_adapter, make_inference_parser, read_json_file, run_record

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
# how a tokenizer cuts text into words → llama.cpp's name of that
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {WORDS % "{1,3}": "llama-bpe", WORDS % "": "qwen2", "digits words": "smollm", "words": "gpt-2"}
# relative error of the logits allowed after merging; llama.cpp's number of a file type, and relative error of a tensor allowed when read back
MERGED = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05}
GGUF = {"f32": (0, 0), "f16": (1, 1e-3), "bf16": (32, 4e-3), "q8_0": (7, 0.02), "q5_0": (8, 0.1), "q4_0": (2, 0.2)}
K_QUANTS = {"q4_k_m": (15, 0.15), "q5_k_m": (17, 0.1), "q6_k": (18, 0.1)}  # made by libgguf
INSTEAD = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # for rows that are no multiple of 256, as in llama.cpp
# what every form of the model is asked, and the longest answer in tokens
PROMPTS = ("试用期最长多久？", "房东不退押金怎么办？", "借钱不还，没有借条，怎么起诉？", "公司 3 个月没发工资了", "用一句话解释“违约金”。", "离婚时房子怎么分？", "List  three:\n1.", "１２３ 🚀 1+1=？")
STEPS = 16

# ---- 1. The same questions to every form of the model ----

def ask(model, prompts: list[list[int]], ends: list[int]) -> tuple[list[list[int]], list]:
    """The most probable answers to `prompts`, up to one of `ends`, and the logits of their first tokens."""
    import torch
    greedy = {"max_new_tokens": STEPS, "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0,
              "eos_token_id": ends, "pad_token_id": ends[0], "output_logits": True, "return_dict_in_generate": True}
    outputs = [model.generate(input_ids=(x := torch.tensor([ids], device=model.device)), attention_mask=torch.ones_like(x), **greedy) for ids in prompts]
    return [x.sequences[0, len(ids):].tolist() for x, ids in zip(outputs, prompts)], torch.cat([x.logits[0].float().cpu() for x in outputs])

def ask_llama_cpp(path: Path, conversations: list[list[dict]]) -> list[tuple[int, list[int]]]:
    """llama.cpp's number of prompt tokens and greedy answer for each conversation, which it renders and cuts into tokens itself."""
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(path), 2048, 1, False, -1
    server, options = xllamacpp.Server(params), {"max_tokens": STEPS, "temperature": 0, "samplers": ["temperature"], "return_tokens": True, "verbose": True}
    replies = [server.handle_chat_completions({"messages": messages, **options}) for messages in conversations]
    return [(reply["usage"]["prompt_tokens"], reply["__verbose"]["tokens"]) for reply in replies]

# ---- 2. A plain model directory ----

def serving_template(template: str) -> str:
    """A chat template that writes by itself, in any program, what the training wrote: its fixed date, and no thinking."""
    template = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda match: repr(TEMPLATE_DATE.strftime(match[2])), template)
    fixed = {"enable_thinking": "false", "date_string": repr(TEMPLATE_DATE.strftime("%d %b %Y"))}  # llama.cpp has its own date_string
    return "".join(f"{{% set {name} = {value} %}}" for name, value in fixed.items() if name in template) + template

def save_merged(model, tokenizer, dtype, folder: Path) -> None:
    """Save `model` so that today's readers and older ones (transformers 4, vLLM, Ollama) load the same model from it."""
    model.to(dtype).save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    for file in Path(model.name_or_path).glob("*processor*.json"):  # how a vision-language model takes images
        shutil.copy(file, folder)
    config, words = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "tokenizer_config.json"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # old readers take a missing one for 10000, and a missing rope_scaling for none, without a word
        scaling = None if rope["rope_type"] == "default" else {key: value for key, value in rope.items() if key != "rope_theta"}
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "torch_dtype": config["dtype"]}
    words |= {"additional_special_tokens": words.pop("extra_special_tokens", []), "chat_template": tokenizer.chat_template}
    words["tokenizer_class"] = words["tokenizer_class"].replace("TokenizersBackend", "PreTrainedTokenizerFast")  # transformers 4's name
    for name, values in (("config.json", config), ("tokenizer_config.json", words)):
        (folder / name).write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")

# ---- 3. GGUF and its Modelfile: a header {name of a GGUFWriter.add_… method: its argument or arguments}, and tensors (name, function that loads it, type, shape) ----

def gguf_header(config, tokenizer) -> dict:
    """What llama.cpp must know of a model, and of its tokenizer by its rules and not its name; exit 4 for what it cannot express."""
    from gguf import GGML_QUANT_VERSION, TokenType
    rope = getattr(config, "rope_parameters", None) or {}
    if config.architectures[0] not in ARCHITECTURES or rope.get("rope_type") not in ("default", "llama3") or config.hidden_act != "silu":
        fail(4, f"{config.architectures[0]}（位置编码 {rope.get('rope_type')}）还不能写成 GGUF，能写的是 {'、'.join(ARCHITECTURES)}。只合并：加 --merge_only")
    state, n_words = json.loads(tokenizer.backend_tokenizer.to_str()), config.vocab_size
    bpe, sentencepiece = state["model"], bool(state["model"].get("byte_fallback"))
    names = {"Split": lambda part: part["pattern"].get("Regex", "?"), "Digits": lambda part: "digits" if part["individual_digits"] else "?",
             "ByteLevel": lambda part: "?" if part["add_prefix_space"] else "words" if part["use_regex"] else "",
             "NFC": lambda part: "", "Prepend": lambda part: "▁", "Replace": lambda part: "▁", "Metaspace": lambda part: "▁"}
    parts = [part for one in (state["normalizer"], state["pre_tokenizer"]) if one for part in one.get("normalizers", one.get("pretokenizers", [one]))]
    rule = " ".join(filter(None, (names.get(part["type"], lambda part: "?")(part) for part in parts)))
    if bpe["type"] != "BPE" or len(tokenizer) > n_words or not (set(rule) <= {"▁", " "} if sentencepiece else rule in PRE_TOKENIZERS):
        fail(4, f"tokenizer（{bpe['type']}，{len(tokenizer)} 个词，规则 {rule[:200] or '无'}）写不成 GGUF：llama.cpp 会切得不一样。只合并：加 --merge_only")
    texts, types = [f"[PAD{i}]" for i in range(n_words)], [TokenType.UNUSED] * n_words
    for text, i in bpe["vocab"].items():
        texts[i], types[i] = text, TokenType.BYTE if sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", text) else TokenType.NORMAL
    for token in state["added_tokens"]:
        texts[token["id"]], types[token["id"]] = token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if sentencepiece:  # the earlier a merge, the higher the score of what it makes
        rank = {"".join(merge): -float(n) for n, merge in reversed(list(enumerate(bpe["merges"])))}
        words = {"tokenizer_model": "llama", "tokenizer_pre": "default", "token_scores": [rank.get(text, -1e6) for text in texts],
                 "add_space_prefix": "▁" in "".join(tokenizer.tokenize((tokenizer.bos_token or "") + "a"))}
    else:
        words = {"tokenizer_model": "gpt2", "tokenizer_pre": PRE_TOKENIZERS[rule], "token_merges": [" ".join(merge) for merge in bpe["merges"]]}
    ids = encode(tokenizer, [*conversation("a"), {"role": "assistant", "content": "a"}])[0]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"type": "model", "quantization_version": GGML_QUANT_VERSION, "vocab_size": n_words, "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
            "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads, "key_length": size, "value_length": size,
            "layer_norm_rms_eps": config.rms_norm_eps, "rope_dimension_count": size, "rope_freq_base": rope["rope_theta"],
            **words, "token_list": texts, "token_types": types, "chat_template": serving_template(tokenizer.chat_template),
            "add_bos_token": tokenizer.bos_token_id == ids[0] == tokenizer("a").input_ids[0], "eot_token_id": ids[-1],
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}}

def gguf_weight(config, name: str) -> tuple:
    """llama.cpp's name of a weight (exit 4 where it has none), and the function that puts its rows in llama.cpp's order."""
    import gguf
    architecture = ARCHITECTURES[config.architectures[0]]
    new = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if not new:
        fail(4, f"权重 {name} 在 GGUF 里没有对应的名字。只合并：加 --merge_only")
    # a Llama's rotary pairs stand half a head apart in transformers and side by side in llama.cpp
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2]) if architecture == "llama" else None
    return new, (lambda x: x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)) if heads else lambda x: x

def model_tensors(folder: Path, config, kind: str) -> list[tuple]:
    """The tensors of the model in `folder`, none of them in memory; matrices of type `kind` where it can be."""
    import numpy
    from gguf import GGMLQuantizationType
    from safetensors import safe_open
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    tensors = []
    if config.rope_parameters["rope_type"] == "llama3":
        slowed = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
        factors = (config.rope_parameters["rope_theta"] ** (-numpy.arange(len(slowed)) / len(slowed)) / slowed).astype(numpy.float32)
        tensors.append(("rope_freqs.weight", lambda: factors, GGMLQuantizationType.F32, factors.shape))
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    for file in sorted(folder.glob("*.safetensors")):
        for name in (weights := safe_open(file, "pt")).keys():  # noqa: SIM118 - not a dict
            (new, reorder), shape = gguf_weight(config, name), tuple(weights.get_slice(name).get_shape())
            tensors.append((new, lambda weights=weights, name=name, reorder=reorder: reorder(weights.get_tensor(name).float().numpy()),
                            GGMLQuantizationType[tensor_type(new, shape, kind, new == head, config.num_hidden_layers).upper()], shape))
    return tensors

def tensor_type(name: str, shape: tuple, kind: str, is_head: bool, n: int) -> str:
    """The type of a tensor in a file of type `kind`, for a model of `n` layers: vectors stay exact, and the head gets more bits."""
    if len(shape) == 1:
        return "f32"
    best = "q8_0" if is_head and kind in ("q4_0", "q5_0") else kind
    if kind in K_QUANTS:  # of the _m kinds llama.cpp gives the head, and the values and down projections of some layers, 6 bits
        i = int((re.findall(r"blk\.(\d+)\.(?:attn_v|ffn_down)", name) or [-1])[0])
        best = "q6_k" if is_head or i >= 0 and (i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2) else kind.removesuffix("_m")
        best = INSTEAD[best] if shape[-1] % 256 else best
    return "f16" if best.startswith("q") and shape[-1] % 32 else best  # a block is 32 numbers of a row

def adapter_parts(adapter: str, config) -> tuple[dict, list[tuple]]:
    """Header and tensors of a LoRA; exit 4 for one that llama.cpp cannot express: other weights than A and B, or another scale in some layers."""
    from gguf import GGMLQuantizationType
    from safetensors.torch import load_file
    lora, tensors = json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8")), []
    for key, x in load_file(Path(adapter, "adapter_model.safetensors")).items():
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if {"lora_A": x.shape[0], "lora_B": x.shape[-1]}.get(half) != lora.get("r", 0) or lora.get("alpha_pattern") or module == "lm_head" and config.tie_word_embeddings:
            fail(4, f"llama.cpp 的 LoRA 文件装不下 {adapter} 里的 {key}（{lora['peft_type']}）。先合并再转换：去掉 --adapter_gguf")
        name, reorder = gguf_weight(config, f"{module}.weight")
        x = reorder(x.float().numpy()) if half == "lora_B" else x.float().numpy()
        tensors.append((f"{name}.{half.lower()}", lambda x=x: x, GGMLQuantizationType.F32, x.shape))
    alpha = lora["lora_alpha"] * (lora["r"] ** 0.5 if lora.get("use_rslora") else 1)  # llama.cpp scales by alpha / r
    return {"type": "adapter", "string": ("adapter.type", "lora"), "float32": ("adapter.lora.alpha", alpha)}, tensors

def write_gguf(path: Path, config, header: dict, tensors: list[tuple]) -> float:
    """Write a GGUF file, with one tensor in memory at a time; returns the largest relative error of a tensor when it is read back."""
    import gguf
    import numpy
    from numpy.linalg import norm
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.architectures[0]])
    for name, value in ((name, value) for name, value in header.items() if value is not None):
        getattr(writer, f"add_{name}")(*(value if isinstance(value, tuple) else [value]))
    for name, _, kind, shape in tensors:
        writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), int(numpy.prod(gguf.quant_shape_to_byte_shape(shape, kind))), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, load, kind, _ in tensors:
        is_k = kind.name.endswith("_K")
        writer.write_tensor_data(importlib.import_module("libgguf").quantize_rows(load(), int(kind)) if is_k else gguf.quants.quantize(load(), kind))
    writer.close()
    pairs = ((load(), gguf.quants.dequantize(found.data, found.tensor_type)) for (_, load, *_), found in zip(tensors, gguf.GGUFReader(path).tensors, strict=True))
    return max(float(norm(found - wanted) / max(norm(wanted), 1e-30)) for wanted, found in pairs)

def modelfile(source: str, tokenizer, bos: str, ends: list[int], options: dict, system: str) -> str:
    """The text of a Modelfile. Its template is the chat template, rendered with marks for the contents; one that is more than a text between
    each two roles is left to the GGUF file. `bos` is what llama.cpp puts before every prompt by itself."""
    from jinja2 import TemplateError
    def between(*roles: str) -> list[str]:
        messages = [{"role": role, "content": f"\ue000{n}\ue001"} for n, role in enumerate(roles)]
        try:
            pieces = re.split("\ue000(\\d+)\ue001", tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).removeprefix(bos))
        except TemplateError:
            return []
        return pieces[::2] if pieces[1::2] == [str(n) for n in range(len(roles))] else []

    def go(text: str) -> str:  # Ollama drops what is not printable, an ideographic space for example, unless it is escaped
        return "{{ " + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False)) + " }}" if text else ""

    lines = [f"FROM ./{source}", *(f"PARAMETER {name} {value}" for name, value in options.items())]
    lines += [f'PARAMETER stop "{tokenizer.decode([i])}"' for i in ends] + [f'SYSTEM """{system}"""'] * bool(system)
    alone, first, longer = between("user"), between("system", "user"), between("system", "user", "assistant", "user", "assistant", "user")
    if alone and first and longer == [*first[:2], *longer[2:4] * 2, first[2]] and alone[1] == first[2]:
        texts = {("", "user"): alone[0], ("", "system"): first[0], ("system", "user"): first[1], ("user", "assistant"): longer[2], ("assistant", "user"): longer[3]}
        cases = "".join(f'{{{{ if and (eq $last "{a}") (eq .Role "{b}") }}}}{go(text)}{{{{ end }}}}' for (a, b), text in texts.items())
        template = f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{cases}{{{{ .Content }}}}{{{{ $last = .Role }}}}{{{{ end }}}}{go(alone[1])}'
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join(lines) + "\n"

# ---- 4. Everything in one folder, that gets its name when all is well ----

def main() -> None:
    parser = make_inference_parser(__doc__)
    group = parser.add_argument_group("导出")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--output_dir", help="写到这个新目录；默认是 LoRA 旁边的 export/")
    add("--use_original_model", action="store_true", help="只用基础模型，不加 LoRA")
    either("--gguf", nargs="+", choices=(*GGUF, *K_QUANTS), help="GGUF 的精度，可以写几个，默认 q8_0")
    either("--merge_only", action="store_true", help="只写合并后的模型，不写 GGUF")
    either("--adapter_gguf", action="store_true", help="不合并，只把 LoRA 写成 GGUF")
    add("--dtype", choices=("auto", *MERGED), default="auto", help="合并后的精度；auto 和基础模型一样")
    args = parse_args(parser)
    kinds = [] if args.merge_only or args.adapter_gguf else args.gguf or ["q8_0"]
    if set(kinds) & set(K_QUANTS) and not importlib.util.find_spec("libgguf"):
        fail(2, "k 量化要先装 libgguf：pip install libgguf==0.2.2。不装也行：写 --gguf f16，再在那个目录里 ollama create 名字 -q q4_K_M")
    adapter = find_adapter(args.lora_weights and args.lora_weights[0]) if args.adapter_gguf or not args.use_original_model else None
    base = find_model(args.base_model or adapter and read_json_file(Path(adapter, "adapter_config.json")).get("base_model_name_or_path"))
    output = Path(args.output_dir or (Path(adapter).parent / "export" if adapter else f"output/export-{Path(base).name}"))
    if output.exists() or len(args.lora_weights or []) > 1:
        fail(2, "--lora_weights 一次导出一个" if len(args.lora_weights or []) > 1 else f"{output} 已经存在。换一个 --output_dir，或先移走它")
    trained = run_record(adapter).get("args", {})
    system = (trained.get("system") if args.system is None else args.system) or ""
    if kinds and ('"""' in system or not system.replace("\n", "").isprintable()):
        fail(2, 'Ollama 的 SYSTEM 里写不下 """ 和看不见的字符（全角空格也是）。用 --system 给一个不含它们的')

    # ---- 4.1 The trained model: what it answers, every file must answer ----
    import torch
    trusted, stored = args.trust_remote_code, read_json_file(Path(base, "config.json"))
    dtype = args.dtype if args.dtype != "auto" else stored.get("dtype") or stored.get("torch_dtype") or "float32"
    exact = pick_device(args.device, "auto" if dtype == "bfloat16" else "float32")  # merged in bf16, nothing finer would come out
    tokenizer = load_tokenizer(adapter if adapter and Path(adapter, "tokenizer_config.json").is_file() else base, trusted)
    quantization = args.quantization if args.quantization != "none" else trained.get("quantization", "none")
    model = load_base(base, *exact, quantization, trusted)
    config = (model := model.dequantize() if getattr(model, "is_quantized", False) else model).config
    header = gguf_header(config, tokenizer) if kinds or args.adapter_gguf else {}
    model = load_adapter(model, tokenizer, adapter, force=args.force) if adapter else model
    if adapter and not hasattr(model.base_model, "merge_adapter"):
        fail(4, f"{adapter} 学的是虚拟 token（{trained.get('peft_method', 'PEFT')}），合并不进权重，也写不成 GGUF。直接用：python inference.py --lora_weights {adapter} --interactive")
    parts = adapter_parts(adapter, config) if args.adapter_gguf else ()
    tokenizer.chat_template, ends = serving_template(tokenizer.chat_template), end_token_ids(model, tokenizer)
    prompts = [encode(tokenizer, conversation(question, system))[0] for question in PROMPTS]
    answers, logits = ask(model, prompts, ends)

    # ---- 4.2 Every file, in a folder that gets its name when all are checked ----
    def check(name: str, passed: bool, found: str) -> None:
        print(f"{name:16} {'通过　' if passed else '不通过'}  {found}", flush=True)
        if not passed:
            fail(4, f"{name} 没有通过核对，写出来的文件都已删除")

    staging = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if args.adapter_gguf:
            check("adapter.gguf", (error := write_gguf(staging / "adapter.gguf", config, *parts)) == 0, f"读回的误差 {error:g}（要求 0）")
        else:
            save_merged(model.merge_and_unload() if adapter else model, tokenizer, getattr(torch, dtype), staging)
            del model
            found, merged = ask(load_base(str(staging), *exact, trust_remote_code=trusted), prompts, ends)
            error, same = float((merged - logits).norm() / logits.norm()), sum(a == b for a, b in zip(answers, found))
            check("model.safetensors", error <= MERGED[dtype], f"{dtype}；和合并前比，logits 最大差 {(merged - logits).abs().max():.1e}，"
                  f"相对误差 {error:.1e}（要求 ≤ {MERGED[dtype]:g}），{same}/{len(prompts)} 个回答相同")
        for kind in kinds:
            path, (file_type, allowed) = staging / f"model-{kind}.gguf", (GGUF | K_QUANTS)[kind]
            error = write_gguf(path, config, header | {"file_type": file_type}, model_tensors(staging, config, kind))
            check(path.name, error <= allowed, f"{path.stat().st_size / 1e6:.1f} MB；读回的相对误差 {error:.1e}（要求 ≤ {allowed:g}）")
            if importlib.util.find_spec("xllamacpp"):
                told = ask_llama_cpp(path, [conversation(question, system) for question in PROMPTS])
                known = sum(length == len(prompt) for (length, _), prompt in zip(told, prompts))
                same = sum(theirs == ours for (_, theirs), ours in zip(told, answers))
                check(path.name, known == len(told) and (same > 0 or allowed > 0.05), f"llama.cpp：{known}/{len(told)} 个提示词切得一样（要求全部），"
                      f"{same}/{len(told)} 个回答相同（q8_0 和更高的精度要求有）")
        if kinds:
            options = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "repeat_penalty": args.repetition_penalty,
                       "num_ctx": min(4096, config.max_position_embeddings), **({"seed": args.seed} if args.seed != 42 else {}),
                       **({"num_predict": args.max_new_tokens} if args.max_new_tokens != 512 else {})}
            bos = tokenizer.bos_token if header["add_bos_token"] else ""
            (staging / "Modelfile").write_text(modelfile(f"model-{kinds[0]}.gguf", tokenizer, bos, ends, options, system), encoding="utf-8")
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(output)

if __name__ == "__main__":
    run_script(main)
