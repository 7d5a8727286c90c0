"""对手之一：LitGPT 的 finetune_lora。由 train_speed.py 运行：python peer_litgpt.py 任务.json

它的 setup() 原样运行，只是数据换成同样的 token，验证、样例生成和最后的合并去掉，这些都对它有利。第一次运行先转换权重，不计时。
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import litgpt.finetune.lora as finetune
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule, get_sft_collate_fn

    class SameRows(DataModule):
        prompt_style = None

        def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **kwargs):
            self.batch_size = batch_size

        def train_dataloader(self):
            rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)}}
                    for ids, labels in job["rows"]]
            return torch.utils.data.DataLoader(rows, self.batch_size, shuffle=True, collate_fn=get_sft_collate_fn(job["max_length"]))

        def val_dataloader(self):
            return self.train_dataloader()

    def write(step, loss):
        with open(Path(job["folder"], "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")

    def log_metrics(metrics, step=None):
        if "loss" in metrics:
            write(metrics["step"], metrics["loss"])

    def begin(*args, **kwargs):  # stands for the check of the validation loop right before the first step
        write(0, None)
        return torch.tensor(0.0)

    finetune.validate = begin
    # its own one divides by zero where the warm-up is the whole run
    finetune.get_lr_scheduler = lambda optimizer, **kwargs: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    finetune.choose_logger = lambda *args, **kwargs: SimpleNamespace(log_metrics=log_metrics)
    for name in ("generate_example", "merge_lora", "save_hyperparameters", "save_prompt_style"):
        setattr(finetune, name, lambda *args, **kwargs: None)
    lora = job["lora"]
    finetune.setup(
        checkpoint_dir=Path(job["litgpt_model"]), out_dir=Path(job["folder"]), precision="32-true", lora_r=lora["r"], lora_alpha=lora["lora_alpha"],
        lora_dropout=lora["lora_dropout"], lora_query=True, lora_key=True, lora_value=True, lora_projection=True, lora_mlp=True, data=SameRows(),
        train=TrainArgs(save_interval=None, log_interval=job["accumulation"], global_batch_size=job["batch_size"] * job["accumulation"],
                        micro_batch_size=job["batch_size"], lr_warmup_steps=1, epochs=1, max_seq_length=job["max_length"]),
        eval=EvalArgs(interval=10**9, max_new_tokens=1, initial_validation=False, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": job["learning_rate"], "weight_decay": 0.0}}, seed=job["seed"])


if __name__ == "__main__":
    main()
