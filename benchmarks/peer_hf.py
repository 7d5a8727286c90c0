"""对手之一：transformers 自带的 Trainer + PEFT。由 train_speed.py 运行：python peer_hf.py 任务.json

mode：group = 按长度分组；dynamic = 填充到微批里最长的一行；padded = 每行都填充到 max_length（很多教程的写法）。
"""

import json
import sys
from pathlib import Path


def step_log(folder: str):
    """A TrainerCallback that writes a line when the first step begins and one after each optimizer step."""
    from transformers import TrainerCallback

    def write(**metric):
        with open(Path(folder, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(metric) + "\n")

    class StepLog(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                write(step=0, loss=None)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                write(step=state.global_step, loss=float(logs["loss"]))

    return StepLog()


def trainer_settings(job: dict) -> dict:
    """What Trainer and SFTTrainer share: the settings of train.py; nothing is saved or reported, which is in their favour."""
    return {"output_dir": job["folder"], "num_train_epochs": 1, "per_device_train_batch_size": job["batch_size"],
            "gradient_accumulation_steps": job["accumulation"], "learning_rate": job["learning_rate"], "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "disable_tqdm": True, "seed": job["seed"]}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} for ids, labels in job["rows"]]
    padding = {"padding": "max_length", "max_length": job["max_length"]} if job["mode"] == "padded" else {"padding": True}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**job["lora"]))
    settings = trainer_settings(job)
    if job["mode"] == "group":
        settings["train_sampling_strategy"] = "group_by_length"
    trainer = Trainer(model, TrainingArguments(**settings), train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer, **padding),
                      callbacks=[step_log(job["folder"])])
    trainer.train()


if __name__ == "__main__":
    main()
