"""The demo's images."""

from pathlib import Path

from jobs.demo_images import draw_set


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_arguments_draw_the_same_set_and_another_seed_another(tmp_path):
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        draw_set(tmp_path / name, num_images=12, seed=seed, num_broken=2)
    first, second, other = (contents(tmp_path / name) for name in ("first", "second", "other"))
    assert (len(first), first) == (12, second)
    assert set(first.values()).isdisjoint(set(other.values()) - {b"", b"<html><body>404 Not Found</body></html>"})
