"""The recipe for Ray Data: its two callables, given rows and batches as Ray gives them."""

import numpy as np
import pytest
from models import build, small_config
from ray_data import Classify, Decode
from videos import write_numbered

from zeroi2v import inference


@pytest.mark.parametrize("labels", [(), tuple(f"class {i}" for i in range(11))])
def test_rows_get_the_answers_of_predict_and_bad_files_their_errors(tmp_path, labels):
    model = build(small_config(labels=labels))
    model.save_pretrained(tmp_path / "model")
    paths = [str(tmp_path / f"{i}.mp4") for i in range(3)]
    for i, path in enumerate(paths):
        write_numbered(path, 9 + 5 * i)
    (tmp_path / "1.mp4").write_text("no video")
    expected = inference.predict(model, paths, topk=2)

    decode = Decode(str(tmp_path / "model"))
    rows = [decode({"path": path, "more": i}) for i, path in enumerate(paths)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    assert batch["views"].dtype == np.uint8
    found = Classify(str(tmp_path / "model"), topk=2)(batch)
    assert sorted(found) == ["error", "labels", "more", "path", "probabilities"]
    for i, answer in enumerate(expected):
        if i == 1:
            assert found["error"][i] == answer["error"]
            assert found["labels"][i] == found["probabilities"][i] == []
            continue
        assert found["error"][i] == ""
        assert found["labels"][i] == [entry["label"] for entry in answer["topk"]]
        np.testing.assert_allclose(
            found["probabilities"][i], [e["probability"] for e in answer["topk"]], rtol=1e-5
        )
