"""用微调好的模型回答问题：一个问题、一个文件的问题，或者多轮聊天。

  python inference.py --interactive                            # 聊天，用 output/ 里最新的 LoRA
  python inference.py --prompt "劳动合同试用期最长多久？"
  python inference.py --prompt_file test_questions.txt --output answers.jsonl

读：LoRA 目录（默认最新的 output/*/final_model）和它的基础模型。写：回答到标准输出，或 --output 的文件。
在自己的程序里：from inference import load_model, generate_response
"""

import argparse
import contextlib
import importlib.util
import json
import re
import sys
import time
from pathlib import Path

from common import (SUFFIXES, add_loading_flags, decode, encode, end_token_ids, fail, find_model, fingerprint, image_inputs, load_base, load_rows, load_tokenizer, make_parser, number, parse_args,
                    pick_device, pick_quantization, run_script, say, sha256, visible)

HELP = """/help           显示这些命令
/reset          忘掉前面的对话
/undo           撤回上一轮问答
/system TEXT    换系统提示词并重新开始（不写 TEXT = 去掉）
/image FILE     下一个问题带上这张图片
/save FILE      把对话存成 JSON 文件
/exit           退出（exit、quit、退出 也行）；回答时按 Ctrl-C 只停下这个回答"""

# ---- 1. Flags: compare_models.py and evaluate_model.py take the same ----

def make_inference_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags of `load_model` and `generate`."""
    add = (parser := make_parser(doc)).add_argument_group("模型").add_argument
    add("--lora_weights", "--lora_model_path", "--lora_model", action="append", help="LoRA 目录；默认 output/ 里最新的")
    add("--base_model", "--model_name", "--model_name_or_path", help="基础模型目录；默认用训练时的那个")
    add("--force", action="store_true", help="LoRA 和基础模型对不上也继续")
    add_loading_flags(add)
    add = parser.add_argument_group("生成").add_argument
    add("--system", help="系统提示词；默认用训练时的，写 \"\" 就不用")
    add("--max_new_tokens", type=number(int, 1), default=512, help="回答最多多少 token")
    add("--temperature", type=number(float, 0, 5), default=0.0, help="随机程度（0 = 总是选最可能的）")
    add("--top_p", type=number(float, 0, 1, above=True), default=0.9, help="只在累计概率 p 以内选（1 = 不限）")
    add("--top_k", type=number(int, 0), default=50, help="只在前 k 个词里选（0 = 不限）")
    add("--repetition_penalty", type=number(float, 0, 10, above=True), default=1.0, help="重复惩罚（1 = 不用）")
    add("--seed", type=number(int, 0, 2**31), default=42, help="随机种子")
    add("--answer_batch_size", type=number(int, 1), default=32, help="同时回答几个问题；内存不够就减小")
    return parser

def generation_options(args) -> dict:
    """The keyword arguments of `generate` in a namespace; what it lacks, or has as None, keeps its default."""
    return {name: getattr(args, name) for name in generate.__kwdefaults__ if getattr(args, name, None) is not None}

def read_questions(path: str, answers: bool = False) -> list[list[dict]]:
    """A conversation for each line of a text file but for blank ones and # comments, or for each row of a data file up to its answer, or with it."""
    if Path(path).suffix.lower() in SUFFIXES:
        return [conversation(row["text"]) if "text" in row else row["messages"][:None if answers else -1] for row in load_rows(path)[0]]
    Path(path).is_file() or fail(2, f"没有问题文件 {path}；它应该是文本，一行一个问题")
    lines = [line.strip() for line in decode(Path(path).read_bytes(), path)[0].splitlines()]
    return [conversation(line) for line in lines if line and not line.startswith("#")] or fail(3, f"{path} 里没有问题；一行写一个")

def keep_questions(path: str | None, *outputs) -> None:
    """Exit 2 where one of `outputs` (None: nothing is written) is the file of questions (None: there is none)."""
    if clash := next((output for output in outputs if path and output and Path(output).resolve() == Path(path).resolve()), None):
        fail(2, f"{clash} 就是问题文件，写到那里会盖掉它。给 --output、--json 或 --report 换一个名字")

def conversation(asked: str | list[dict], system: str | None = None, images=()) -> list[dict]:
    """The messages of a question (`images`: with these), or those given, after the system prompt if there is one and they have none of their own."""
    messages = [{"role": "user", "content": asked, **({"images": images} if images else {})}] if isinstance(asked, str) else asked
    return [*messages] if not system or messages and messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]

# ---- 2. Loading ----

def find_adapter(path: str | None) -> str:
    """The adapter in `path` or its final_model/; None is the newest output/*/final_model, said aloud."""
    if path is None:
        path = max((p.parent for p in Path("output").glob("*/final_model/adapter_config.json")), key=lambda p: p.stat().st_mtime, default=None) or fail(4, "output/ 里还没有训练好的模型。先训练：./train_csv.sh；只问原模型：python inference.py --use_original_model")
        say(f"使用最新的 LoRA：{path}")
    found = (str(p) for p in (Path(path), Path(path, "final_model")) if (p / "adapter_config.json").is_file())
    return next(found, None) or fail(4, f"{path} 不是 LoRA 目录（里面没有 adapter_config.json）。看看有哪些：ls -d output/*/final_model")

def read_json_file(path: Path) -> dict:
    """What a JSON file of an adapter or a model holds; exit 4 where it is broken, {} where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        fail(4, f"{path} 损坏了，读不出来：{error}。换一个 LoRA（ls -d output/*/final_model），模型就重新下载")

def run_record(adapter: str | None) -> dict:
    """The run.json of the run that made `adapter`; {} for an adapter from elsewhere."""
    record = read_json_file(Path(adapter, "..", "run.json").resolve()) if adapter else {}
    return record if {"args", "base_fingerprint", "template_sha256"} <= set(record) else {}  # other tools have files of this name

def load_adapter(model, tokenizer, adapter: str, name: str = "default", force: bool = False):
    """`model` with the LoRA in `adapter` put on; exit 4 where they do not belong together (`force`: a warning). PEFT itself loads an adapter
    of another base of the same shape, one with missing keys, and one full of NaN."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    try:
        weights = load_file(Path(adapter, "adapter_model.safetensors"))
        if hasattr(model, "peft_config"):
            model.load_adapter(adapter, name, torch_device=str(model.device))
        else:
            model = PeftModel.from_pretrained(model, adapter, name, torch_device=str(model.device))
    except Exception as error:  # noqa: BLE001 - missing, truncated, wrong shape, broken config: a dozen unrelated types
        fail(4, f"LoRA {adapter} 装不到 {model.name_or_path} 上：{str(error).splitlines()[0][:200]}")
    problems = [f"权重 {key} 里有 NaN 或无穷大" for key, value in weights.items() if not value.isfinite().all()][:1]
    if not any(value.any() for key, value in weights.items() if not re.search("lora_(A|embedding_B|magnitude)", key)):
        problems.append("权重全是零，等于没有训练过")
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=any(".base_layer." in key for key in weights))
    problems += [f"权重名和模型对不上，例如 {key}" for key in sorted(weights.keys() ^ expected.keys())[:1]]
    made = {Path(adapter, name): entry["sha256"] for name, entry in read_json_file(Path(adapter, "manifest.json")).get("files", {}).items()}
    problems += [f"{file.name} 不是训练时写的那个" for file, digest in made.items() if not file.is_file() or sha256(file.read_bytes()) != digest]
    if run := run_record(adapter):
        pairs = [("基础模型的权重", run["base_fingerprint"], fingerprint(model.name_or_path)), ("对话模板", run["template_sha256"], sha256(tokenizer.chat_template))]
        config, begun = model.peft_config[name], run["args"].get("init_lora_weights") or run["args"].get("peft_method", "")
        if hasattr(config, "r") and begun[:5] not in ("pissa", "olora"):  # those are saved with twice the rank
            pairs += [("lora_r", run["args"]["lora_r"], config.r), ("lora_alpha", run["args"]["lora_alpha"], config.lora_alpha)]
        problems += [f"{what}和训练时不同（{str(then)[:12]} → {str(now)[:12]}）" for what, then, now in pairs if then != now]
    if problems and not force:
        fail(4, f"LoRA {adapter}：{'；'.join(problems)}。\n换成训练它的那个基础模型（--base_model），确定要用就加 --force")
    problems and say(*(f"警告：{problem}" for problem in problems), sep="\n")
    return model.eval()

def can_fold(model) -> bool:
    """Whether an adapter may be added into the weights: no virtual tokens, nor into quantized weights or one that is embedding and output head at once."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = getattr(ends[0], "base_layer", ends[0]).weight is getattr(ends[1], "base_layer", ends[1]).weight
    return hasattr(model.base_model, "merge_adapter") and not getattr(model, "is_quantized", False) and not (tied and any(hasattr(end, "base_layer") for end in ends))

def load_model(base_model: str | None = None, lora_weights: str | None = None, device: str = "auto", merge: bool = False, force: bool = False,
               quantization: str = "none", trust_remote_code: bool = False):
    """(model, tokenizer) ready to answer: the base alone where `lora_weights` is None, else with that LoRA (`merge`: folded in). Without
    `base_model` it is the one that the adapter was trained on, or the default model, or the demo model."""
    base = find_model(base_model or (read_json_file(Path(lora_weights, "adapter_config.json")).get("base_model_name_or_path") if lora_weights else None))
    tokenizer = load_tokenizer(lora_weights if lora_weights and Path(lora_weights, "tokenizer_config.json").is_file() else base, trust_remote_code)
    tokenizer.name_or_path = base  # where the processor of images is
    device, dtype = pick_device(device)
    model = load_base(base, device, dtype, pick_quantization(quantization, base, device), trust_remote_code)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))  # of a slice, oneDNN multiplies each row with a copy of the weights
    model = load_adapter(model, tokenizer, lora_weights, force=force) if lora_weights else model
    return model.merge_and_unload() if merge and lora_weights and can_fold(model) else model, tokenizer

# ---- 3. Answering ----

def roomy_cache(model):
    """An empty key-value cache with room for 256 more tokens at a time: the library's own copies all earlier keys and values for every new token,
    37 % of the time of a batch on a CPU. Layers of another kind (a sliding window) stay the library's."""
    from transformers.cache_utils import DynamicCache, DynamicLayer
    class RoomyLayer(DynamicLayer):
        def update(self, *states, **kwargs):
            start, end = self.get_seq_length(), self.get_seq_length() + states[0].shape[-2]
            if start == 0 or end > self.rooms[0].shape[-2]:
                states, start = super().update(*states), 0  # all so far, which the library has put together: they move into the larger room
                self.rooms = [x.new_empty(*x.shape[:-2], end + 256, x.shape[-1]) for x in states]
            for room, x in zip(self.rooms, states):
                room[..., start:end, :] = x
            self.keys, self.values = (room[..., :end, :] for room in self.rooms)
            return self.keys, self.values
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

def generate(model, tokenizer, conversations: list[list[dict]], *, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 0.9, top_k: int = 50,
             repetition_penalty: float = 1.0, seed: int = 42, answer_batch_size: int = 32, streamer=None, progress=lambda rows: None) -> list[dict]:
    """Answers to `conversations`, in their order: {"text", "tokens", "stopped", "seconds"} each; greedy at temperature 0. Prompts of like length
    go together, padded on the left, and each greedy answer is the one it would be alone (in fp32); one that is drawn or penalised depends on its
    neighbours, and a long prompt leaves them less room, so those are made one by one. A greedy one made alone tries the three tokens that followed
    its last ones earlier in the text, and keeps those that the model says too: it reads its weights once for up to four tokens
    (https://github.com/apoorvumang/prompt-lookup-decoding). `stopped`: the model ended by itself. `seconds`: a batch's time divided by its rows.
    `progress` is called after each batch with the number of its rows."""
    import torch
    prompts = [encode(tokenizer, messages)[0] for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else dict.fromkeys(("temperature", "top_p", "top_k"))
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)  # PEFT puts them in front of the padding
    ends, window = end_token_ids(model, tokenizer), (getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize) - virtual
    options = {**drawn, "do_sample": temperature > 0, "num_beams": 1, "use_cache": True, "repetition_penalty": repetition_penalty,
               "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id, "streamer": streamer, "cache_implementation": None}  # a model's settings may name one
    plain = not virtual and temperature == 0 and repetition_penalty == 1
    size = answer_batch_size if plain and max(map(len, prompts), default=0) + max_new_tokens <= window else 1
    answers: list[dict] = [{} for _ in prompts]
    for start in range(0, len(order), size):
        rows = order[start:start + size]
        width = len(prompts[rows[0]])
        width < window or fail(2, f"问题有 {width} token，超过了模型的上限 {window}。缩短问题再试")
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in rows]}, return_attention_mask=True, return_tensors="pt").to(model.device)
        batch |= image_inputs(model, tokenizer, [m for i in rows for m in conversations[i]], batch["input_ids"])
        cache = roomy_cache(model)  # what is not roomy (a window, a state) cannot go back to before a wrong guess, and images are no text to guess from
        # nor may a guess go past the last position
        ahead = 3 if plain and len(rows) == 1 and len(batch) == 2 and width + max_new_tokens + 3 <= window and {type(layer).__name__ for layer in cache.layers} == {"RoomyLayer"} else None
        torch.manual_seed(seed)
        began = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(**batch, **options, max_new_tokens=min(max_new_tokens, window - width), past_key_values=cache, prompt_lookup_num_tokens=ahead)
        seconds = (time.perf_counter() - began) / len(rows)
        for i, ids in zip(rows, output[:, width:].tolist()):
            end = next((k for k, token in enumerate(ids) if token in ends), None)
            answers[i] = {"text": tokenizer.decode(ids[:end], skip_special_tokens=True).strip(), "tokens": len(ids[:end]), "stopped": end is not None, "seconds": seconds}
        progress(len(rows))
    return answers

def generate_response(model, tokenizer, question: str, args=None) -> str:
    """The model's answer to one question. `args` may be anything that has some of the generation flags as attributes."""
    answer = generate(model, tokenizer, [conversation(question, getattr(args, "system", None))], **generation_options(args))[0]["text"]
    return clean_repeats(answer) if getattr(args, "clean_repeats", False) else answer

def clean_repeats(text: str) -> str:
    """`text` without a tail that says one unit of 2 to 80 characters three times or more; one of them stays. Not noughts and blanks to fill in."""
    tail = re.search(r"(?!([\d\s_.…—=-]{2,80}?)\1{2})(.{2,80}?)\2{2,}.{0,80}$", text, re.DOTALL)
    return text[:tail.end(2) + (text[tail.end(2)] in "。！？；.!?")] if tail else text

# ---- 4. Chat ----

def chat(model, tokenizer, args) -> None:
    """A conversation whose answers stream; it is cut from the front when it no longer fits the model."""
    from transformers import TextStreamer
    window = max((most := getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096) // 2, most - args.max_new_tokens)
    system, turns, images = args.system, [], args.image
    sys.stdin.reconfigure(errors="replace")  # half a character must not end the chat
    importlib.util.find_spec("readline") and importlib.import_module("readline")  # arrow keys, and lines of any length
    say("开始聊天。/help 看命令，/exit 退出")
    while True:
        try:
            if (line := input("\n你：" if sys.stdin.isatty() else "").strip()) in ("/exit", "exit", "quit", "退出"):
                return
        except (EOFError, KeyboardInterrupt):
            return print()
        command, rest = [*line.split(maxsplit=1), "", ""][:2]
        if command == "/help":
            print(HELP)
        elif command == "/undo":
            turns = turns[:-2]
            print(f"已撤回，还剩 {len(turns) // 2} 轮。")
        elif command in ("/reset", "/system"):
            system, turns = system if command == "/reset" else rest, []
            print(f"已清空对话。系统提示词：{system or '无'}")
        elif command == "/image":
            with contextlib.suppress(SystemExit):  # why an image cannot be used has been said then
                importlib.import_module("prepare_data").see(tokenizer, conversation("", images=[rest]))
                images = [*images, rest]
                print(f"下一个问题带 {len(images)} 张图片。")
        elif command == "/save":
            try:
                Path(rest).write_text(json.dumps(conversation(turns, system), ensure_ascii=False, indent=1), encoding="utf-8")
                print(f"已保存 {len(conversation(turns, system))} 条消息到 {rest}")
            except OSError as error:
                print(f"不能写 {rest or '（没有写文件名）'}：{error.strerror}")
        elif command.startswith("/"):
            print(f"没有 {command} 这个命令，/help 看全部。")
        elif line:
            turns, images = [*turns, *conversation(line, images=images)], []
            while len(turns) > 1 and len(encode(tokenizer, conversation(turns, system))[0]) > window:
                turns = turns[2:]
            said, printer = [], TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            printer.on_finalized_text = lambda text, stream_end=False, said=said: (said.append(text), print(visible(text), end="\n" * stream_end, flush=True))
            try:
                answer = generate(model, tokenizer, [conversation(turns, system)], streamer=printer, **generation_options(args))[0]["text"]
            except (KeyboardInterrupt, SystemExit):  # a question that is too long has been told so
                print("（已停下）")
                answer = "".join(said).strip()
            turns = turns + [{"role": "assistant", "content": answer}] if answer else turns[:-1]

def main() -> None:
    parser = make_inference_parser(__doc__)
    add = parser.add_argument_group("问题").add_argument
    add("--prompt", help="一个问题")
    add("--image", nargs="+", default=[], help="问题里的图片，可以几张；视觉语言模型用")
    add("--prompt_file", help="问题文件，一行一个，# 开头的是注释")
    add("--interactive", action="store_true", help="多轮聊天")
    add("--output", help="回答写到这个文件；.jsonl 每行一个对象，其他是文本")
    add("--use_original_model", action="store_true", help="只用基础模型，不加 LoRA")
    add("--merge", action=argparse.BooleanOptionalAction, default=True, help="把 LoRA 合并进权重，生成更快（量化时不合并）")
    add("--clean_repeats", action="store_true", help="去掉回答末尾的重复")
    args = parse_args(parser)
    keep_questions(args.prompt_file, args.output)
    if not (args.prompt or args.prompt_file or args.interactive) or len(args.lora_weights or []) > 1:
        fail(2, '加 --interactive 聊天，或 --prompt "问题"，或 --prompt_file FILE；--lora_weights 一次一个，几个一起用 compare_models.py')
    questions = read_questions(args.prompt_file) if args.prompt_file else [conversation(args.prompt, images=args.image)] if args.prompt else []
    adapter = None if args.use_original_model else find_adapter(args.lora_weights and args.lora_weights[0])
    model, tokenizer = load_model(args.base_model, adapter, args.device, args.merge, args.force, args.quantization, args.trust_remote_code)
    args.system = run_record(adapter).get("args", {}).get("system") if args.system is None else args.system
    if args.interactive:
        return chat(model, tokenizer, args)
    out = open(args.output, "a", encoding="utf-8") if args.output else sys.stdout  # noqa: SIM115 - what cannot be written shows now, not after the answers
    from tqdm import tqdm
    with tqdm(total=len(questions), desc="回答", disable=len(questions) == 1 or not sys.stderr.isatty()) as bar:
        for first in range(0, len(questions), args.answer_batch_size):  # Ctrl-C loses one batch, not all that was answered
            asked = questions[first:first + args.answer_batch_size]
            answers = generate(model, tokenizer, [conversation(q, args.system) for q in asked], **generation_options(args), progress=bar.update)
            first == 0 and args.output and out.seekable() and out.truncate(0)  # the old answers stay until there are new ones; /dev/stdout cannot be cut
            for question, answer in zip((q[-1]["content"] for q in asked), answers):
                text = clean_repeats(answer["text"]) if args.clean_repeats else answer["text"]
                line = f"问：{visible(question)}\n答：{visible(text)}\n" if args.prompt_file else visible(text)
                print(json.dumps({"question": question, "answer": text, "stopped": answer["stopped"]}, ensure_ascii=False) if (args.output or "").endswith(".jsonl") else line, file=out, flush=True)
    args.output and say(f"{len(questions)} 个回答写到 {args.output}")

if __name__ == "__main__":
    run_script(main)
