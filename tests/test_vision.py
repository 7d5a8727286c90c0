"""An `image` column: vision-language models learn what is in images, without torchvision, and every script that reads questions takes the images."""

import json
import shutil

import pytest
from PIL import Image

from conftest import call, make_other_vision_model, make_vision_model, metrics, run, train, write_csv

COLOURS = {"红": (255, 0, 0), "蓝": (0, 0, 255), "绿": (0, 255, 0)}
QUESTION = "图片里是什么颜色？"
QUICK = ["--val_ratio", 0, "--save_every", -1, "--lora_dropout", 0, "--batch_size", 2, "--gradient_accumulation_steps", 2]


@pytest.fixture(scope="session", params=["Qwen3VL", "Qwen2_5_VL"])
def vision(request, tmp_path_factory):
    """Path of a tiny random vision-language model."""
    return make_vision_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Path of a CSV of six images in two sizes, one question for all, and of a row without an image."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = [("", "一年有几个季节？", "四个。")]
    for name, colour in COLOURS.items():
        for size in ((64, 64), (96, 64)):
            Image.new("RGB", size, colour).save(folder / f"{name}{size[0]}.png")
            rows.append((f"{name}{size[0]}.png", QUESTION, f"这张图片是{name}色的。"))
    return write_csv(folder / "colours.csv", rows, header=("image", "instruction", "output"))


@pytest.fixture(scope="session")
def learned(vision, pictures, tmp_path_factory):
    """A run that has learned the images by heart."""
    return train(vision, pictures, tmp_path_factory.mktemp("learned") / "run", *QUICK, "--num_epochs", 40, "--learning_rate", 1e-2, "--logging_steps", 10)


def answers(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_six_images_are_learned_by_heart(learned, pictures, tmp_path, capsys):
    call("inference.py", "--lora_weights", learned, "--prompt_file", pictures, "--max_new_tokens", 40, "--output", tmp_path / "together.jsonl")
    expected = ["四个。"] + [f"这张图片是{name}色的。" for name in COLOURS for _ in range(2)]
    assert [answer["answer"] for answer in answers(tmp_path / "together.jsonl")] == expected  # images of two sizes and none, in one batch
    call("inference.py", "--lora_weights", learned, "--prompt_file", pictures, "--max_new_tokens", 40, "--output", tmp_path / "alone.jsonl", "--answer_batch_size", 1)
    assert answers(tmp_path / "alone.jsonl") == answers(tmp_path / "together.jsonl")
    folder = pictures.rpartition("/")[0]
    capsys.readouterr()
    call("inference.py", "--lora_weights", learned, "--prompt", QUESTION, "--image", f"{folder}/绿96.png")
    assert capsys.readouterr().out == "这张图片是绿色的。\n"


@pytest.mark.parametrize("kind", ["Llava", "Gemma3"])
def test_other_models_learn_where_the_librarys_processor_takes_images(kind, pictures, tmp_path):
    model = make_other_vision_model(tmp_path / kind, kind)
    learned = train(model, pictures, tmp_path / "run", *QUICK, "--num_epochs", 40, "--learning_rate", 1e-2, "--logging_steps", 10)
    call("inference.py", "--lora_weights", learned, "--prompt_file", pictures, "--max_new_tokens", 40, "--output", tmp_path / "answers.jsonl")
    assert [answer["answer"] for answer in answers(tmp_path / "answers.jsonl")] == ["四个。"] + [f"这张图片是{name}色的。" for name in COLOURS for _ in range(2)]


def test_a_conversation_takes_images_as_it_goes(learned, pictures):
    folder = pictures.rpartition("/")[0]
    said = run("inference.py", "--lora_weights", learned, "--interactive", stdin=f"/image {folder}/蓝64.png\n{QUESTION}\n/image 没有.png\n/reset\n/image {folder}/红96.png\n{QUESTION}\n/exit\n")
    assert said.stdout.index("这张图片是蓝色的。") < said.stdout.index("这张图片是红色的。") and "没有.png 不存在" in said.stderr


def test_a_conversation_with_a_model_that_does_not_see_goes_on(tiny, pictures):
    said = run("inference.py", "--use_original_model", "--base_model", tiny, "--max_new_tokens", 4, "--interactive", stdin=f"/image {pictures.rpartition('/')[0]}/蓝64.png\n你好\n/undo\n/exit\n")
    assert "看不了" in said.stderr and "还剩 0 轮" in said.stdout


def test_ids_and_loss_are_the_librarys_own(vision, pictures, tmp_path):
    """Against the template's own text with the image's token repeated, tokenised whole, and the loss that the library computes of it."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    from common import encode, load_rows, load_tokenizer

    tokenizer, model = load_tokenizer(vision), AutoModelForImageTextToText.from_pretrained(vision).eval()
    processor, total, count = AutoImageProcessor.from_pretrained(vision), 0.0, 0
    for row in load_rows(pictures)[0]:
        asked, answer = row["messages"]
        images = processor([Image.open(path) for path in asked.get("images", [])], return_tensors="pt") if "images" in asked else {}
        content = [*[{"type": "image"}] * ("images" in asked), {"type": "text", "text": asked["content"]}]
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * (int(images["image_grid_thw"].prod()) // 4 if images else 0))
        before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer["content"] + "<|im_end|>"))
        assert encode(tokenizer, [asked])[0] == before
        assert encode(tokenizer, [asked, answer]) == (before + after, [-100] * len(before) + after)
        ids = torch.tensor([before + after])
        kinds = {"mm_token_type_ids": (ids == model.config.image_token_id).long()} if images else {}
        with torch.no_grad():
            total += model(input_ids=ids, labels=torch.tensor([[-100] * len(before) + after]), **images, **kinds).loss.item() * len(after)
        count += len(after)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") not in encode(tokenizer, [{"role": "user", "content": "<|image_pad|>"}])[0]
    run_folder = train(vision, pictures, tmp_path / "run", *QUICK, "--val_data", pictures, "--max_steps", 1)
    assert metrics(run_folder)[0]["val_loss"] == pytest.approx(total / count, rel=1e-5)


def test_lora_is_on_the_language_model_unless_told_otherwise(vision, pictures, learned, tmp_path):
    from safetensors.torch import load_file

    both = train(vision, pictures, tmp_path / "both", *QUICK, "--max_steps", 1, "--train_vision")
    some = train(vision, pictures, tmp_path / "some", *QUICK, "--max_steps", 1, "--layers_to_transform", 1)
    towers = [sorted({".visual." in key for key in load_file(folder / "final_model" / "adapter_model.safetensors")}) for folder in (learned, both, some)]
    assert towers == [[False], [False, True], [False]]
    assert {key.split(".layers.")[1][0] for key in load_file(some / "final_model" / "adapter_model.safetensors")} == {"1"}


def test_a_resumed_run_is_the_uninterrupted_one_and_other_images_are_refused(vision, pictures, tmp_path, capsys):
    from safetensors.torch import load_file

    shutil.copytree(pictures.rpartition("/")[0], tmp_path / "pictures")
    table = tmp_path / "pictures" / "colours.csv"
    steps = [*QUICK, "--num_epochs", 3, "--lora_dropout", 0.1]
    whole = train(vision, table, tmp_path / "whole", *steps)
    train(vision, table, tmp_path / "cut", *steps, "--max_steps", 2)
    call("train.py", "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "auto", "--max_steps", 0)
    mine, other = (load_file(folder / "final_model" / "adapter_model.safetensors") for folder in (whole, tmp_path / "cut"))
    assert all(mine[key].equal(other[key]) for key in mine)
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "pictures" / "红64.png")
    call("train.py", "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "auto", "--num_epochs", 4, "--max_steps", 0, code=4)
    assert "训练数据和 checkpoint 里的不同" in capsys.readouterr().err


def broken(folder):
    """{name: (the bytes of an image file that is none, or none that can be taken, a word of what is said of it)}"""
    whole = folder / "whole.png"
    Image.effect_noise((80, 80), 50).save(whole)
    Image.new("1", (1 << 14, 1 << 13)).save(folder / "huge.png")
    Image.new("RGB", (4, 4000)).save(folder / "long.png")
    return {"没有.png": (None, "不存在"), "cut.png": (whole.read_bytes()[:600], "打不开"), "text.jpg": (b"not an image", "打不开"), "empty.png": (b"", "打不开"),
            "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/bin/sh) run\n", "打不开"), "huge.png": ((folder / "huge.png").read_bytes(), "5000 万以内"),
            "long.png": ((folder / "long.png").read_bytes(), "200 倍")}


@pytest.mark.parametrize("name", ["没有.png", "cut.png", "text.jpg", "empty.png", "script.eps", "huge.png", "long.png"])
def test_an_image_that_cannot_be_taken_is_named_with_its_row(vision, tmp_path, capsys, name):
    content, word = broken(tmp_path)[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    table = write_csv(tmp_path / "t.csv", [("good.png", QUESTION, "黑。"), (name, QUESTION, "红。")], header=("image", "instruction", "output"))
    train(vision, table, tmp_path / "run", "--dry_run", code=3)
    said = capsys.readouterr().err
    assert name in said and word in said and f"{table}:3" in said
    train(vision, table, tmp_path / "run", "--dry_run", "--skip_bad_rows")
    assert "跳过 1 行" in capsys.readouterr().err


def test_llama_factorys_form_loads_without_a_flag(pictures, tmp_path):
    from common import load_rows

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    messages = [{"role": "user", "content": "<image>这是什么？"}, {"role": "assistant", "content": "黑色。"}]
    (tmp_path / "t.json").write_text(json.dumps([{"messages": messages, "images": ["a.png", "a.png"]}]), encoding="utf-8")
    assert load_rows(str(tmp_path / "t.json"))[0][0]["messages"] == [{"role": "user", "content": "这是什么？", "images": [str(tmp_path / "a.png")] * 2}, messages[1]]


def test_an_image_without_a_question_is_skipped_with_its_row(vision, pictures, tmp_path, capsys):
    rows = [{"messages": [{"role": "assistant", "content": "答"}], "image": "a.png"}, {"instruction": "问", "output": "答"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    train(vision, tmp_path / "t.jsonl", tmp_path / "run", "--dry_run")
    assert "t.jsonl:1：问题或回答是空的" in capsys.readouterr().err


def test_what_does_not_go_with_images_is_said(vision, tiny, pictures, tmp_path, capsys):
    train(tiny, pictures, tmp_path / "run", *QUICK, code=4)
    assert "Qwen3-VL" in capsys.readouterr().err
    train(vision, pictures, tmp_path / "run", *QUICK, "--neftune_alpha", 5, code=2)
    assert "--neftune_alpha" in capsys.readouterr().err
    train(vision, pictures, tmp_path / "run", *QUICK, "--peft_method", "ptuning", code=2)
    assert "图片不能和 --peft_method" in capsys.readouterr().err
    train(vision, pictures, tmp_path / "run", *QUICK, "--max_length", 16, code=3)
    assert "--max_length 16 太小" in capsys.readouterr().err
    call("inference.py", "--use_original_model", "--base_model", vision, "--prompt", QUESTION, "--image", tmp_path / "没有.png", code=3)
    assert "没有.png 不存在" in capsys.readouterr().err


def test_before_and_after_and_scores_take_the_images(learned, pictures, tmp_path, capsys):
    call("compare_models.py", "--lora_weights", learned, "--test_file", pictures, "--max_new_tokens", 40, "--json", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [row["answers"][1]["text"] for row in rows] == [row["reference"] for row in rows] != [row["answers"][0]["text"] for row in rows]
    folder = tmp_path / "others"
    shutil.copytree(pictures.rpartition("/")[0], folder)
    for name, colour in COLOURS.items():  # other images than those that were learned, and the same words
        Image.new("RGB", (64, 96), colour).save(folder / f"{name}.png")
    table = write_csv(folder / "test.csv", [(f"{name}.png", QUESTION, f"这张图片是{name}色的。") for name in COLOURS], header=("图片", "问题", "回答"))
    evaluate = ["--lora_weights", learned, "--max_new_tokens", 40, "--metrics", "exact", "perplexity"]
    capsys.readouterr()
    call("evaluate_model.py", *evaluate, "--test_data", table, "--output", tmp_path / "others.csv")
    assert "训练过" not in capsys.readouterr().err
    call("evaluate_model.py", *evaluate, "--test_data", pictures, "--output", tmp_path / "same.csv")
    assert "7 道测试题里有 7 道训练过" in capsys.readouterr().err
    nll = {metric["key"]: metric["scores"] for metric in json.loads((tmp_path / "eval_results.json").read_text(encoding="utf-8"))["metrics"]}["nll"]
    assert nll[1] == pytest.approx(metrics(learned)[-1]["loss"], rel=0.2) and nll[0] > 2 * nll[1]  # the learning rate ends at zero


def test_prepared_rows_keep_their_images_and_an_image_stays_in_one_file(pictures, tmp_path):
    from common import load_rows

    folder = pictures.rpartition("/")[0]
    asked = [f"{QUESTION}{extra}" for extra in ("", "说说看。", "用一句话回答。")]
    table = write_csv(tmp_path / "t.csv", [(f"{folder}/{name}{size}.png", question, f"{name}。") for name in COLOURS for size in (64, 96) for question in asked], header=("image", "instruction", "output"))
    for form, kind in (("jsonl", "messages"), ("csv", "alpaca")):
        call("prepare_data.py", "--input", table, "--output_dir", tmp_path / form, "--format", form, "--format_type", kind, "--test_ratio", 0.3, "--val_ratio", 0)
        parts = [load_rows(str(tmp_path / form / f"{split}.{form}"))[0] for split in ("train", "test")]
        seen = [{path for row in rows for path in row["messages"][0]["images"]} for rows in parts]
        assert sum(map(len, parts)) == 18 and all(seen) and not seen[0] & seen[1] and len(seen[0] | seen[1]) == 6


def test_photographs_are_turned_upright(tmp_path):
    from prepare_data import open_image

    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was held upright
    picture.save(tmp_path / "p.jpg", exif=exif)
    assert open_image(str(tmp_path / "p.jpg")).size == (10, 20)


def test_a_merged_model_sees_without_its_adapter(learned, pictures, tmp_path, capsys):
    call("export_model.py", "--lora_weights", learned, "--merge_only", "--output_dir", tmp_path / "merged")
    capsys.readouterr()
    call("inference.py", "--use_original_model", "--base_model", tmp_path / "merged", "--prompt", QUESTION, "--image", f"{pictures.rpartition('/')[0]}/红64.png")
    assert capsys.readouterr().out == "这张图片是红色的。\n"
    call("export_model.py", "--lora_weights", learned, "--gguf", "f16", "--output_dir", tmp_path / "gguf", code=4)
    assert "--merge_only" in capsys.readouterr().err
