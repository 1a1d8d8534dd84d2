from qtune.model.cache import model_folder


def test_place_follows_the_cache_and_the_identity(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    place = model_folder("x", "one")
    assert place.parent == tmp_path / "models" and place.name.startswith("x-")
    assert place == model_folder("x", "one") != model_folder("x", "two")
