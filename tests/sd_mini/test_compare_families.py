"""The table of families: where it goes, what is in it, that every family of it is a config."""

from types import SimpleNamespace

from omegaconf import OmegaConf

from scripts.sd_mini.compare_families import COLUMNS, FAMILIES, stretch_stages, table, write_table
from tests.conftest import ROOT


def test_every_family_is_a_config():
    assert all((ROOT / "configs/sd-mini" / f"{config}.yaml").is_file() for config, _, _ in FAMILIES.values())


def test_the_table_takes_its_place(tmp_path):
    page = tmp_path / "page.md"
    begin, end = "<!-- table: scripts/sd_mini/compare_families.py -->", "<!-- end of table -->"
    page.write_text(f"# Before\n\n{begin}\nold\n{end}\n\nafter\n")
    write_table(page, "new")
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\n\nafter\n") and "new" in text and "old" not in text
    write_table(page, "newer")
    assert page.read_text() == text.replace("new", "newer")
    write_table(tmp_path / "none.md", "new")
    assert "new" in (tmp_path / "none.md").read_text()


def test_rows_are_means_over_subjects():
    row = dict.fromkeys([*COLUMNS, "CLIP-I before", "CLIP-T before"], 1.0)
    options = SimpleNamespace(subjects=["a", "b"], steps=3, seed=1, class_pictures=4, samples=8)
    text = table({"LoRA": [row, {**row, "CLIP-I": 3.0}]}, options)
    assert "| LoRA | 1 | 1 | 1 | 2.000 ± 1.000 | 1.000 ± 0.000 | 1.000 ± 0.000 |" in text
    assert "pictures of the class | 0 |  |  | 1.000 ± 0.000 | 1.000 ± 0.000 | 0 |" in text
    assert "2 subjects, 3 steps, 4 class pictures, 8 samples of each prompt, seed 1." in text


def test_stages_keep_their_part_of_the_run():
    config = OmegaConf.create({"model": {"params": {"tuning": [{"steps": [0, 200]}, {"steps": [200, None]}, {}]}}})
    stretch_stages(config, 0.25)
    assert config.model.params.tuning == [{"steps": [0, 50]}, {"steps": [50, None]}, {}]
    stretch_stages(OmegaConf.create({"model": {"params": {}}}), 0.25)
