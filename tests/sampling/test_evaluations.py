"""Results of evaluators, in the layouts that they write, come back to the images that they are of."""

import json
import os

import pandas
import pytest
import torch

from mfm_lightning.sampling.evaluations import read_evaluation
from mfm_lightning.sampling.prompt_folder import PromptFolder
from mfm_lightning.sampling.prompts import Prompt

IMAGE = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))


def written(path, layout):
    """A folder with two prompts of two images each."""
    prompts = [Prompt("a cat", None, {"index": 10, "tag": "one"}), Prompt("a dog", None, {"index": 2, "tag": "two"})]
    folder = PromptFolder(path, prompts, 2, layout)
    folder.claim({})
    for image in folder.images:
        folder.write(image.index, IMAGE, {})
    return folder


def geneval(folder, correct):
    """As pandas writes them: in the order of the file system, paths as they were given, slashes escaped."""
    rows = []
    for sub in sorted(p for p in os.listdir(folder) if p.isdigit()):
        metadata = json.loads((folder / sub / "metadata.jsonl").read_text())
        for name in sorted(os.listdir(folder / sub / "samples"), reverse=True):
            path = os.path.join("elsewhere", sub, "samples", name)
            rows.append(
                {
                    "filename": path,
                    "tag": metadata["tag"],
                    "prompt": metadata["prompt"],
                    "correct": correct[f"{sub}/{name}"],
                    "reason": "",
                    "metadata": json.dumps(metadata),
                    "details": "{}",
                }
            )
    pandas.DataFrame(rows).to_json(folder / "results.jsonl", orient="records", lines=True)
    return folder / "results.jsonl"


def test_geneval(tmp_path):
    folder = written(tmp_path / "out", "geneval")
    correct = {"00000/0000.png": True, "00000/0001.png": False, "00001/0000.png": False, "00001/0001.png": True}
    path = geneval(tmp_path / "out", correct)
    assert read_evaluation(path, folder) == {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0}
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace('"reason":""', '"reason":"no\u2028cat"')
    path.write_text("\n".join(lines[:3]))  # a detector that failed on one
    assert read_evaluation(path, folder) == {1: 0.0, 0: 1.0, 3: 1.0}


def test_compbench(tmp_path):
    folder = written(tmp_path, "compbench")
    # as its BLIP and CLIP do: the k-th image in the order of the numbers that names end with
    names = sorted(os.listdir(tmp_path / "samples"), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    by_name = {f"a cat_{i:06d}.png": 0.1 * i for i in range(2)} | {f"a dog_{i:06d}.png": 0.1 * i for i in (2, 3)}
    blip = [{"question_id": k, "answer": f"{by_name[name]:.4f}"} for k, name in enumerate(names)]
    # as its UniDet does: that number itself, in any order
    unidet = [{"question_id": int(n.split("_")[-1].split(".")[0]), "answer": by_name[n]} for n in reversed(names)]
    for rows in (blip, unidet):
        (tmp_path / "vqa_result.json").write_text(json.dumps(rows))
        found = read_evaluation(tmp_path / "vqa_result.json", folder)
        assert found == {i: pytest.approx(0.1 * i) for i in range(4)}
    (tmp_path / folder.files[1]).unlink()
    with pytest.raises(ValueError, match=r"numbers images by their order, and 1 of 4 are missing"):
        read_evaluation(tmp_path / "vqa_result.json", folder)


def test_unigenbench(tmp_path):
    folder = written(tmp_path, "unigenbench")
    rows = []
    for index, points in ((10, [[1, 0], [1, 1]]), (2, [[0, 0], [1, 0]])):
        for j, score in enumerate(points):
            result = {"prompt": "p, quoted", "testpoint": ["A - B", "C"], "analysis": ["x\ny", 'z "'], "score": score}
            rows.append(
                {
                    "index": str(index),
                    "prompt": "p, quoted",
                    "testpoint": str(["A - B", "C"]),
                    "output": "<score>\n[1, 0]</score>" + "long " * 40_000,
                    "result_json": json.dumps(result, ensure_ascii=False, indent=4),
                    "img_path": f"/data/images/{index}_{j}.png",
                }
            )
    pandas.DataFrame(rows).to_csv(tmp_path / "out_en.csv", index=False)
    assert read_evaluation(tmp_path / "out_en.csv", folder) == {0: 0.5, 1: 1.0, 2: 0.0, 3: 0.5}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", "1", r"results are read from \.jsonl, \.json, \.csv \(GenEval"),
        ("r.jsonl", "", r"r\.jsonl has no rows"),
        ("r.jsonl", "{", r"row 1: no JSON"),
        ("r.jsonl", "[1]", r"row 1: a list, expected GenEval's filename and correct"),
        ("r.jsonl", '{"filename": "a"}', r"row 1: no correct, only filename; expected GenEval's results"),
        (
            "r.jsonl",
            '{"filename": "x/00000/samples/0000.png", "correct": true}\n{"filename": "0007.png", "correct": true}',
            r"1 of 2 rows are of no image in .*, first .*row 2 \(0007\.png\); images there are named as 00000/samples",
        ),
        (
            "r.jsonl",
            '{"filename": "00000/samples/0000.png", "correct": true}\n' * 2,
            r"row 2: a second score for the image 00000/samples/0000\.png",
        ),
        ("r.jsonl", '{"filename": "00000/samples/0000.png", "correct": "yes"}', r"row 1: the score is 'yes', expected"),
        ("r.json", "{}", r"a dict, expected T2I-CompBench's list"),
        ("r.json", '[{"question_id": 0, "answer": "nan"}]', r"the score is 'nan', expected a finite number"),
        ("r.json", '[{"question_id": "0", "answer": 1}]', r"question_id is '0', expected a whole number"),
        ("r.json", '[{"question_id": 4, "answer": 1}]', r"1 of 1 rows are of no image in .*row 1 \(4\)"),
        ("r.csv", "img_path,score\na,1\n", r"row 1: no result_json, only img_path, score; expected UniGenBench's"),
        ("r.csv", 'img_path,result_json\na,"{""score"": []}"\n', r"score is \[\], expected a list of 0 and 1"),
    ],
)
def test_what_does_not_fit_is_said_with_its_place(tmp_path, name, content, message):
    folder = written(tmp_path, "geneval")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_evaluation(tmp_path / name, folder)
    with pytest.raises(FileNotFoundError, match=r"no results of an evaluator at .*none\.jsonl: run it on the images"):
        read_evaluation(tmp_path / "none.jsonl", folder)


def test_other_images_of_the_same_names_are_not_taken_for_the_folders(tmp_path):
    """`before/` has the base flow's images under the names of the layout "flat"."""
    folder, file = written(tmp_path / "predict", "flat"), tmp_path / "results.jsonl"
    folder.write_beside("before", 3, IMAGE)
    rows = {"predict/000002.png": 2, str(tmp_path / "predict/000003.png"): 3, "elsewhere/000001.png": 1}
    file.write_text("\n".join(json.dumps({"filename": name, "correct": True}) for name in rows))
    assert read_evaluation(file, folder) == dict.fromkeys(rows.values(), 1.0)
    file.write_text(json.dumps({"filename": "outputs/predict/before/000003.png", "correct": True}))
    with pytest.raises(ValueError, match=r"1 of 1 rows are of no image in .*before/000003.png"):
        read_evaluation(file, folder)
