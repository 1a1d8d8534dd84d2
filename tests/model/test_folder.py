import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from qtune.errors import UserError
from qtune.model.folder import check_folder, read_json, tensor_names


def test_whole_folder_passes(make_folder):
    folder = make_folder()
    check_folder(folder)
    assert tensor_names(folder / "model.safetensors") == {"a", "b"}


@pytest.mark.parametrize("left", [0, 5, 8, 40, -1, -30])
def test_cut_off_weights_are_named(make_folder, left):
    weights = make_folder() / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:left])
    with pytest.raises(UserError, match=r"model\.safetensors is cut off or damaged"):
        check_folder(weights.parent)


def test_weights_with_bytes_too_many_or_an_absurd_header(make_folder):
    weights = make_folder() / "model.safetensors"
    content = weights.read_bytes()
    for wrong in (content + b"\0" * 8, struct.pack("<Q", 1 << 60) + content[8:]):
        weights.write_bytes(wrong)
        with pytest.raises(UserError, match="cut off or damaged"):
            check_folder(weights.parent)


def in_shards(folder):
    (folder / "model.safetensors").unlink()
    save_file({"a": np.ones(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.ones(3)}, folder / "model-00002-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_shards(make_folder):
    folder = in_shards(make_folder())
    check_folder(folder)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is cut off"):
        check_folder(folder)
    second.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_folder(folder)


def test_shard_without_its_tensor(make_folder):
    folder = in_shards(make_folder())
    save_file({"c": np.ones(3)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="lacks b"):
        check_folder(folder)


def test_index_that_is_no_index(make_folder):
    folder = in_shards(make_folder())
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        check_folder(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        check_folder(folder)


def test_pickles_are_refused_with_the_way_out(make_folder):
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*never loaded.*save_pretrained"):
        check_folder(folder)


def test_what_is_missing_is_said(make_folder):
    folder = make_folder()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        check_folder(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(UserError, match=r"no weights.*weights\.safetensors"):
        check_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        check_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        check_folder(folder)


def test_folder_around_the_model_points_inside(make_folder):
    folder = make_folder()
    with pytest.raises(UserError, match=f"did you mean {folder}"):
        check_folder(folder.parent)


def test_adapter_and_gguf_folders_are_explained(tmp_path):
    (tmp_path / "x.gguf").touch()
    with pytest.raises(UserError, match=r"write .*x\.gguf"):
        check_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        check_folder(tmp_path)


def test_json_must_be_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "config.json")
