"""对手：只用 transformers 和 PEFT 的普通写法，一个一个地生成。由 generate_speed.py 运行：python peer_generate.py 任务.json

mode：compare = 原模型和微调后的模型都装进内存，每个问题各答一遍；chat = 只有微调后的，LoRA 不合并。
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["adapter"])
    models = {"微调": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32), job["adapter"]).eval()}
    if job["mode"] == "compare":
        models = {"原始": AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval(), **models}
    answers = []
    for question in job["questions"]:
        for name, model in models.items():
            began = time.perf_counter()
            inputs = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=job["max_new_tokens"], do_sample=False, pad_token_id=tokenizer.pad_token_id)
            ids = output[0, inputs["input_ids"].shape[1]:].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers.append({"model": name, "question": question, "text": text, "tokens": len(ids), "seconds": time.perf_counter() - began})
    Path(job["out"]).write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
