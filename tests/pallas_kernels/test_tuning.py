"""The tuned table: what a kernel gets from it, and what a wrong entry says."""

import dataclasses
import json
import re

import pytest

from pallas_kernels import tuning
from pallas_kernels.tuning import read_table, shape_bucket, trying, tuned, write_entry


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int = 64
    stages: int = 4

    def __post_init__(self):
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be >= 2")


PLACE = {"device_kind": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "bucket": "128K"}


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuning, "TABLE", path)
    return path


def test_the_table_replaces_the_fields_it_names(table):
    write_entry("op.kernel", {"stages": 6}, **PLACE)
    assert tuned("op.kernel", Tiles(rows=128), **PLACE) == Tiles(rows=128, stages=6)


@pytest.mark.parametrize(
    "place",
    [{"device_kind": "NVIDIA H200"}, {"dtype": "int8"}, {"bucket": "8K"}],
    ids=lambda place: next(iter(place)),
)
def test_other_devices_dtypes_and_lengths_keep_the_default(table, place):
    write_entry("op.kernel", {"stages": 6}, **PLACE)
    assert tuned("op.kernel", Tiles(), **PLACE | place) == Tiles()
    assert tuned("op.other", Tiles(), **PLACE) == Tiles()


def test_entries_are_kept_side_by_side(table):
    write_entry("op.kernel", {"stages": 6}, **PLACE)
    write_entry("op.kernel", {"stages": 5}, **PLACE | {"bucket": "8K"})
    write_entry("op.other", {"rows": 128}, **PLACE)
    write_entry("op.kernel", {"stages": 3}, **PLACE)
    assert tuned("op.kernel", Tiles(), **PLACE) == Tiles(stages=3)
    assert tuned("op.kernel", Tiles(), **PLACE | {"bucket": "8K"}) == Tiles(stages=5)
    assert tuned("op.other", Tiles(), **PLACE) == Tiles(rows=128)


def test_a_field_that_does_not_exist_is_named(table):
    write_entry("op.kernel", {"stagez": 6}, **PLACE)
    with pytest.raises(ValueError, match=r"tuned.json: op.kernel.*no field stagez.*rows, stages"):
        tuned("op.kernel", Tiles(), **PLACE)


def test_a_value_that_the_config_refuses_is_placed(table):
    write_entry("op.kernel", {"stages": 1}, **PLACE)
    with pytest.raises(ValueError, match=r"128K: stages=1 must be >= 2"):
        tuned("op.kernel", Tiles(), **PLACE)


def test_a_trial_goes_before_the_table_for_its_kernel_alone(table):
    write_entry("op.kernel", {"stages": 6}, **PLACE)
    with trying("op.kernel", {"stages": 3}) as trial:
        assert tuned("op.other", Tiles(), **PLACE) == Tiles()
        assert trial.bucket is None
        assert tuned("op.kernel", Tiles(), **PLACE) == Tiles(stages=3)
        assert trial.bucket == "128K"
    assert tuned("op.kernel", Tiles(), **PLACE) == Tiles(stages=6)


def test_the_device_is_the_first_one_by_default(table):
    write_entry("op.kernel", {"stages": 6}, **PLACE | {"device_kind": "cpu"})
    assert tuned("op.kernel", Tiles(), dtype="bfloat16", bucket="128K") == Tiles(stages=6)


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(1, "1"), (512, "512"), (513, "1K"), (4097, "8K"), (8192, "8K"), (2**20, "1M")],
)
def test_buckets_of_lengths_are_powers_of_two(length, bucket):
    assert shape_bucket(length) == bucket


def test_other_sizes_are_part_of_the_bucket():
    assert shape_bucket(5000, D=128, Bk=64) == "8K D128 Bk64"


def test_the_package_ships_a_table_of_the_documented_form():
    assert json.loads(tuning.TABLE.read_text(encoding="utf-8")) == read_table()
    for kinds in read_table().values():
        for dtypes in kinds.values():
            for buckets in dtypes.values():
                for bucket, values in buckets.items():
                    assert re.fullmatch(r"\d+[KM]?( [A-Z][a-z]*\d+)*", bucket)
                    assert values
