"""微调前后对比：同样的问题，原模型和微调后的模型各答一遍，并排打印。

  python compare_models.py --test_file test_questions.txt      # 用 output/ 里最新的 LoRA
  python compare_models.py --prompt "劳动合同纠纷如何处理？"
  python compare_models.py --test_file test_questions.txt > evaluation_results.txt

读：LoRA（--lora_weights 可以写几次，一起比较）、它的基础模型、问题文件（一行一个）。写：对比到标准输出。
内存里只有一个模型：关掉 LoRA 是微调前，打开是微调后。
"""

import contextlib
import statistics
import sys
from pathlib import Path

from common import fail, parse_args, run_script, visible
from inference import conversation, find_adapter, generate, generation_options, load_adapter, load_model, make_inference_parser, read_questions, run_record


def main() -> None:
    parser = make_inference_parser(__doc__)
    add = parser.add_argument_group("问题").add_argument
    add("--prompt", help="一个问题")
    add("--test_file", "--prompt_file", default="test_questions.txt", help="问题文件，一行一个，# 开头的是注释")
    args = parse_args(parser)
    questions = [args.prompt] if args.prompt else read_questions(args.test_file)
    adapters = [find_adapter(path) for path in args.lora_weights or [None]]
    args.system = run_record(adapters[0]).get("args", {}).get("system") if args.system is None else args.system
    model, tokenizer = load_model(args.base_model, adapters[0], args.device, force=args.force, quantization=args.quantization)
    names = ["default", *(f"adapter{n}" for n in range(2, len(adapters) + 1))]
    for name, adapter in zip(names[1:], adapters[1:]):
        model = load_adapter(model, tokenizer, adapter, name, args.force)
        if args.base_model is None and model.peft_config[name].base_model_name_or_path != model.peft_config["default"].base_model_name_or_path:
            fail(4, f"{adapter} 的基础模型和 {adapters[0]} 的不同，请分开比较")

    from tqdm import tqdm

    # ---- Every question by the base, then by each adapter ----
    results = []
    with tqdm(total=len(questions) * (1 + len(names)), desc="回答", disable=not sys.stderr.isatty()) as bar:
        for name in [None, *names]:
            if name:
                model.set_adapter(name)
            with contextlib.nullcontext() if name else model.disable_adapter():
                results.append(generate(model, tokenizer, [conversation(q, args.system) for q in questions], **generation_options(args),
                                        progress=lambda n: bar.update(len(results) * len(questions) + n - bar.n)))

    # ---- Side by side; "微调回答长度: N" is what people grep for ----
    notes = [f"（{Path(adapter).parent.name}）" if len(adapters) > 1 else "" for adapter in adapters]
    titles = [("原始", ""), *(("微调", note) for note in notes)]
    for i, question in enumerate(questions):
        print(f"{'=' * 78}\n[{i + 1}/{len(questions)}] 问题: {visible(question)}\n")
        for (title, note), answers in zip(titles, results):
            print(f"{title}回答{note}: {visible(answers[i]['text'])}" + ("\n" if answers[i]["stopped"] else " ……（到长度上限还没说完）\n"))
        for (title, note), answers in zip(titles, results):
            print(f"{title}回答长度: {len(answers[i]['text'])} 字{note}")
        print("用时: " + "，".join(f"{title} {answers[i]['seconds']:.1f} 秒" for (title, _), answers in zip(titles, results)))
    print("=" * 78)
    for (title, note), answers in zip(titles, results):
        print(f"{title}{note}：平均 {statistics.fmean(len(a['text']) for a in answers):.0f} 字，{sum(a['stopped'] for a in answers)}/{len(answers)} 个自己结束，"
              f"{sum(a['tokens'] for a in answers) / sum(a['seconds'] for a in answers):.1f} token/s")


if __name__ == "__main__":
    run_script(main)
