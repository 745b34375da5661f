"""Which rows are in each global batch: every row once, for any number of processes, and from any batch on."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_miniclip.data.loading import order as orders
from modeling_miniclip.data.loading.batches import GlobalBatches
from modeling_miniclip.data.loading.dataset import FILLER
from modeling_miniclip.data.loading.mixing import Mixture, owners, shares_of, shuffled_order
from modeling_miniclip.data.loading.order import InOrder, RowOrder, ShuffledInWindows
from modeling_miniclip.data.shards import split_shards
from modeling_miniclip.data.shards.shard_url import member_url, table_url
from modeling_miniclip.data.shards.split_shards import find_shards

few = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "WINDOW_ROWS", 12)
    monkeypatch.setattr(orders, "WINDOW_SHARDS", 3)
    monkeypatch.setattr(orders, "PIECE", 7)


def boundaries_of(sizes: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])


def order_named(name: str, rows: int, seed: int = 3) -> RowOrder:
    """An order of some kind; shards have 5 rows, sets are a third and the rest."""
    sizes = [rows // 3, rows - rows // 3]
    boundaries = np.append(np.arange(0, rows, 5), rows)
    weights = [0.6, 0.4] if name.startswith("mixed") else None
    if name == "in order":
        return InOrder(rows)
    return shuffled_order(rows, 4, seed, boundaries if name.endswith("windows") else None, sizes, weights)


KINDS = ("in order", "full", "windows", "mixed full", "mixed windows")
ONCE = KINDS[:3]  # each row once per epoch


def rows_of(order: RowOrder, epoch: int = 0, start: int = 0) -> list[int]:
    return [row for piece in order.pieces(epoch, start) for _, row in piece.tolist()]


def keys_of(order: RowOrder, epochs: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(key) for epoch in epochs for piece in order.pieces(epoch) for key in piece.tolist()]


def windows_of(order: RowOrder, epoch: int = 0) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "PIECE", 1000)
        return [piece[:, 1].tolist() for piece in order.pieces(epoch)]


def batches_of(order: RowOrder, size: int, world_size: int, epoch: int = 0, first: int = 0) -> list[list[int]]:
    """The rows of each global batch, put together from the shares of all processes; fillers are left out."""
    shares = []
    for rank in range(world_size):
        batches = GlobalBatches(order, size, rank, world_size)
        batches.epoch, batches.first_batch = epoch, first
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
    together = []
    for parts in zip(*shares, strict=True):
        assert all(parts), "a process without a row would leave the others waiting"
        batch = [part[i][1] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
        assert all(FILLER - row == batch[0] for row in batch if row < 0)
        together.append([row for row in batch if row >= 0])
    return together


# --- global batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (9, 4), (8, 4), (3, 8), (1, 1), (40, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_all_processes_together_have_the_global_batch(kind: str, rows: int, size: int) -> None:
    order = order_named(kind, rows)
    whole = rows_of(order)
    expected = [whole[start : start + size] for start in range(0, rows, size)]
    for world_size in (1, 2, 3, 4):
        assert batches_of(order, size, world_size) == expected


@few
@given(st.sampled_from(ONCE), st.integers(1, 60), st.integers(1, 9), st.lists(st.sampled_from([1, 2, 4]), max_size=4),
       st.data())  # fmt: skip
def test_resuming_with_other_process_counts_sees_each_row_once(
    kind: str, rows: int, size: int, processes: list[int], data: st.DataObject
) -> None:
    order, seen, first = order_named(kind, rows), Counter[int](), 0
    for world_size in [*processes, 2]:  # each but the last is stopped after some batches
        batches = batches_of(order, size, world_size, epoch=2, first=first)
        done = len(batches) if world_size is None else data.draw(st.integers(0, len(batches)))
        seen.update(row for batch in batches[:done] for row in batch)
        first += done
    seen.update(row for batch in batches_of(order, size, 1, epoch=2, first=first) for row in batch)
    assert seen == Counter(range(rows))


@few
@given(st.sampled_from(KINDS), st.integers(1, 60), st.integers(0, 60), st.integers(0, 3))
def test_an_epoch_continues_at_any_place(kind: str, rows: int, start: int, epoch: int) -> None:
    order = order_named(kind, rows)
    assert rows_of(order, epoch, min(start, rows)) == rows_of(order, epoch)[start:]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_order_depends_on_epoch_and_seed(kind: str) -> None:
    found = [rows_of(order_named(kind, 30), epoch) for epoch in range(3)] + [rows_of(order_named(kind, 30, 4))]
    assert len({tuple(rows) for rows in [*found, range(30)]}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_each_use_of_a_row_has_another_key(kind: str) -> None:
    order = order_named(kind, 30)  # with weights, the first set is used almost twice per epoch
    keys = keys_of(order, range(3))
    assert len(set(keys)) == len(keys) == 90
    if kind in ONCE:
        assert [number for number, _ in keys] == [0] * 30 + [1] * 30 + [2] * 30
    assert keys_of(order, [5]) == keys_of(order_named(kind, 30), [5])


def test_full_order_is_that_of_earlier_releases() -> None:
    expected = np.random.default_rng([5, 2]).permutation(1000)
    assert rows_of(shuffled_order(1000, 32, 5), 2) == expected.tolist()


# --- windows --------------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(0, 3))
def test_windows_hold_whole_shards(sizes: list[int], epoch: int) -> None:
    boundaries, order = boundaries_of(sizes), ShuffledInWindows(boundaries_of(sizes), 1)
    windows = windows_of(order, epoch)
    assert sorted(row for window in windows for row in window) == list(range(sum(sizes)))
    shards = [set((boundaries.searchsorted(window, "right") - 1).tolist()) for window in windows]
    assert sum(map(len, shards)) == len(set().union(*shards)) == sum(size > 0 for size in sizes)
    assert all(len(window) <= 12 + 20 for window in windows if len(window) <= 12 or max(sizes) <= 4)


def test_window_has_several_large_or_many_small_shards() -> None:
    large, small = ShuffledInWindows(boundaries_of([100] * 9)), ShuffledInWindows(boundaries_of([1] * 48))
    assert [len(window) for window in windows_of(large)] == [300] * 3
    assert [len(window) for window in windows_of(small)] == [12] * 4
    (first, *_) = windows_of(small)
    assert first != sorted(first) != list(range(12))


def test_windows_before_a_resumed_batch_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ShuffledInWindows(boundaries_of([10] * 300))
    drawn = []
    rows = ShuffledInWindows._rows

    def spy(self: ShuffledInWindows, window: np.ndarray) -> np.ndarray:
        drawn.append(window)
        return rows(self, window)

    monkeypatch.setattr(ShuffledInWindows, "_rows", spy)
    assert len(rows_of(order, 0, 2995)) == 5 and len(drawn) == 1


def test_shards_are_named_a_window_before_they_are_needed() -> None:
    named: list[set[int]] = []
    read: list[int] = []
    called: list[int] = []

    def on_next(rows: np.ndarray) -> None:
        named.append(set(rows.tolist()))
        called.append(len(read))

    order = shuffled_order(300, 10, boundaries=boundaries_of([10] * 30), on_next=on_next)
    for piece in order.pieces(0, 35):
        read += piece[:, 1].tolist()
    assert called == [0, 0, *range(25, 235, 30)]  # windows have 30 rows, and the first one is left out
    found = list(named)
    assert found == [{row // 10 * 10 for row in window} for window in windows_of(order)[1:]]


def test_shards_of_weighted_sets_are_named_by_their_rows() -> None:
    named, read = set[int](), set[int]()
    order = shuffled_order(300, 10, 0, boundaries_of([10] * 30), [100, 200], [1, 1], lambda rows: named.update(rows))
    for piece in order.pieces(0, 35):
        read |= {row // 10 * 10 for row in piece[:, 1].tolist()}
        assert read <= named <= set(range(0, 300, 10))


# --- several datasets -----------------------------------------------------------------------------------------------


SIZES, WEIGHTS = [50, 9, 200], [0.5, 0.3, 0.2]
STARTS = [0, 50, 59, 259]


def mixture(window: bool = False) -> Mixture:
    boundaries = np.append(np.arange(0, 259, 7), 259) if window else None
    mixed = shuffled_order(259, 10, 1, boundaries, SIZES, WEIGHTS)
    assert isinstance(mixed, Mixture)
    return mixed


@pytest.mark.parametrize("window", [False, True])
def test_weights_give_each_set_its_share_of_epoch_and_batch(window: bool) -> None:
    mixed = mixture(window)
    assert mixed.shares == [129, 78, 52]  # of 259, by 0.5, 0.3 and 0.2: 129.5, 77.7 and 51.8
    for epoch in range(3):
        rows = rows_of(mixed, epoch)
        assert np.histogram(rows, STARTS)[0].tolist() == mixed.shares
        for start in range(0, 250, 10):
            counts = np.histogram(rows[start : start + 10], STARTS)[0]
            assert np.abs(counts - [5, 3, 2]).max() <= 1


@pytest.mark.parametrize("window", [False, True])
def test_a_set_that_runs_out_starts_again_and_goes_on_in_the_next_epoch(window: bool) -> None:
    mixed = mixture(window)
    epochs = [rows_of(mixed, epoch) for epoch in range(4)]
    for number, size in enumerate(SIZES):
        used = [row for rows in epochs for row in rows if STARTS[number] <= row < STARTS[number + 1]]
        passes = [used[start : start + size] for start in range(0, len(used), size)]
        for whole in passes[:-1]:
            # Batches are shuffled, so a pass may exchange a few rows with the next one where they meet.
            assert len(set(whole)) >= size - 6
        counts = Counter(used)
        assert max(counts.values()) - min([*counts.values()] + [0] * (len(counts) < size)) <= 1
        assert mixed.times_used(4)[number] == pytest.approx(len(used) / size)
        assert len({tuple(one) for one in passes if len(one) == size}) == sum(len(one) == size for one in passes)


def test_sets_of_one_size_have_different_orders() -> None:
    rows = np.array(rows_of(shuffled_order(40, 8, 0, None, [20, 20], [1, 1])))
    first, second = rows[rows < 20], rows[rows >= 20] - 20
    assert sorted(first) == sorted(second) == list(range(20)) and first.tolist() != second.tolist()


@few
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum), st.integers(0, 200))
def test_owners_of_places_spread_evenly(shares: list[int], start: int) -> None:
    total = sum(shares)
    owner, use = owners(np.arange(total), shares)
    for number, share in enumerate(shares):
        assert use[owner == number].tolist() == list(range(share))
        so_far = np.cumsum(owner == number) - np.arange(1, total + 1) * share / total
        assert np.abs(so_far).max() <= 1 + number / 2
    part = owners(np.arange(min(start, total), total), shares)
    assert [each.tolist() for each in part] == [each[start:].tolist() for each in (owner, use)]


@few
@given(st.integers(1, 1000), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_exact_to_one(total: int, weights: list[float]) -> None:
    shares = shares_of(total, weights)
    assert sum(shares) == total
    assert np.abs(np.array(shares) - total * np.array(weights) / sum(weights)).max() < 1 + 1e-6


def test_an_empty_set_has_no_share() -> None:
    rows = rows_of(shuffled_order(10, 4, 0, None, [0, 10], [0.5, 0.5]))
    assert sorted(rows) == list(range(10))


# --- shards of a split ----------------------------------------------------------------------------------------------


def split_of(names: Sequence[str | None]) -> Dataset:
    return Dataset.from_dict(
        {"image": [{"bytes": None if name else b"x", "path": name} for name in names]},
        features=Features({"image": Image(decode=False)}),
    )


def tar_names(shard: str, count: int) -> list[str]:
    return [member_url(shard, 512 * i, 9, f"{i}.jpg") for i in range(count)]


def test_shards_are_found_by_the_names_of_their_images() -> None:
    split = split_of([*tar_names("/a::b/0.tar", 3), *tar_names("/a::b/1.tar", 1), *tar_names("s3://x/2.tar", 4)])
    assert find_shards(split).boundaries.tolist() == [0, 3, 4, 8]
    assert find_shards(split).need_windows and not find_shards(split.select(range(4))).need_windows
    assert find_shards(split.select([0, 2, 3, 4, 6])).boundaries.tolist() == [0, 2, 3, 5]
    assert find_shards(split.select([])).boundaries.tolist() == [0]


def test_shards_are_found_across_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1, 9000, 1, 4095, 3, 4096]
    names = [name for i, size in enumerate(sizes) for name in tar_names(f"{i}.tar", size)]
    split = concatenate_datasets([split_of(names[:5000]), split_of(names[5000:])])
    assert find_shards(split).boundaries.tolist() == boundaries_of(sizes).tolist()


def test_images_outside_shards_form_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_shards, "LOOSE", 4)
    split = split_of([*[f"/images/{i}.jpg" for i in range(6)], *tar_names("0.tar", 9), None, None])
    found = find_shards(split)
    assert found.boundaries.tolist() == [0, 4, 6, 15, 17] and not found.need_windows
    assert found.names == ["", "", "0.tar", ""]


def test_row_groups_of_parquet_files_are_shards(tmp_path: Path) -> None:
    path = str(tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": [b"x"] * 10}), path, row_group_size=4)
    names = [table_url(path, row, "image") for row in (0, 1, 3, 4, 8, 9)]
    names += [table_url(str(tmp_path / "missing.parquet"), row, "image") for row in range(3)]
    found: Any = find_shards(split_of(names))
    assert found.boundaries.tolist() == [0, 3, 4, 6, 9] and found.need_windows
