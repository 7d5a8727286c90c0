"""对手之一：TRL 的 SFTTrainer。由 train_speed.py 运行：python peer_trl.py 任务.json

mode：default = 它自己的默认（梯度检查点开着）；nockpt = 关掉梯度检查点；padfree = 再加 padding_free。
"""

import json
import sys
from pathlib import Path

from peer_hf import step_log, trainer_settings


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = {**trainer_settings(job), "max_length": job["max_length"]}
    if job["mode"] != "default":
        settings["gradient_checkpointing"] = False
    if job["mode"] == "padfree":
        settings |= {"padding_free": True, "max_length": None}  # TRL wants it so; the rows are cut already
    rows = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in job["rows"]])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    trainer = SFTTrainer(model, SFTConfig(**settings), train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(job["model"]),
                         peft_config=LoraConfig(**job["lora"]), callbacks=[step_log(job["folder"])])
    trainer.train()


if __name__ == "__main__":
    main()
