"""The kernel sources are found and read as one self-contained text each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from bnkernels.runtime import source
from tools.compile import __main__ as compiled
from tools.compile import nvrtc


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a folder of our own in place of ``cuda/``."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "kernel.cuh").write_text("#pragma once\nshared\n")
    monkeypatch.setattr(source, "_CANDIDATES", (tmp_path / "absent", tmp_path))
    source.folder.cache_clear()
    yield tmp_path
    source.folder.cache_clear()


def lines_by_place(text: str) -> dict[tuple[str, int], str]:
    """Return every line under the file and number that a compiler would name."""
    places, name, number = {}, "", 0
    for line in text.splitlines():
        if directive := re.fullmatch(r'#line (\d+) "(.*)"', line):
            name, number = directive[2], int(directive[1])
        else:
            places[name, number] = line
            number += 1
    return places


@pytest.mark.parametrize("stem", source.stems())
def test_every_line_keeps_its_file_and_number(stem: str) -> None:
    places = lines_by_place(source.read(stem))
    for path in source.folder().rglob("*.cu*"):
        name = f"cuda/{path.relative_to(source.folder()).as_posix()}"
        if (name, 1) not in places:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.startswith(("#include", "#pragma once")):
                assert places[name, number] == line
    assert (f"cuda/{stem}.cu", 1) in places
    assert ("cuda/lib/kernel.cuh", 1) in places


@pytest.mark.parametrize("stem", source.stems())
def test_the_text_is_self_contained_and_the_same_wherever_it_is_installed(stem: str) -> None:
    text = source.read(stem)
    assert '#include "' not in text
    assert str(source.folder().parent) not in text


def test_each_header_comes_once_where_it_is_first_included(sources: Path) -> None:
    (sources / "lib" / "pair.cuh").write_text('#include "lib/kernel.cuh"\npair\n')
    (sources / "op.cu").write_text('// op\n#include "lib/pair.cuh"\n#include "lib/kernel.cuh"\nbody\n')
    text = source.read("op")
    assert [line for line in text.splitlines() if line and not line.startswith("#line")] == [
        *("// op", "shared", "pair", "body"),
    ]
    places = lines_by_place(text)
    assert places["cuda/lib/kernel.cuh", 2] == "shared"
    assert places["cuda/lib/pair.cuh", 2] == "pair"
    assert places["cuda/op.cu", 4] == "body"


def test_system_headers_stay(sources: Path) -> None:
    (sources / "op.cu").write_text("#include <cuda_fp16.h>\n")
    assert "#include <cuda_fp16.h>" in source.read("op")


def test_an_unknown_source_is_named_with_those_there_are(sources: Path) -> None:
    (sources / "op.cu").write_text("body\n")
    with pytest.raises(FileNotFoundError, match=r"no kernel source opp\.cu .* it has op$"):
        source.read("opp")


def test_a_missing_header_is_named(sources: Path) -> None:
    (sources / "op.cu").write_text('#include "gone.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"gone\.cuh"):
        source.read("op")


def test_nvidias_cuda_folder_is_not_taken_for_ours(sources: Path) -> None:
    (sources / "absent").mkdir()
    (sources / "absent" / "bindings.py").write_text("")
    assert source.folder() == sources


def test_the_message_names_all_places_searched(sources: Path) -> None:
    (sources / "lib/kernel.cuh").unlink()
    with pytest.raises(FileNotFoundError, match="install the package again") as error:
        source.folder()
    assert f"searched {sources / 'absent'} and {sources};" in str(error.value)


ENTRY_POINTS = [(stem, name) for stem in source.stems() for name in source.entry_points(stem)]


def test_every_kernel_of_the_baseline_is_made_by_one_line() -> None:
    names = sorted(name for _, name in ENTRY_POINTS)
    for version in nvrtc.VERSIONS:
        assert names == sorted(compiled.baseline(version)["registers"]), version


@pytest.mark.parametrize(("stem", "entry_point"), ENTRY_POINTS)
def test_the_text_of_one_kernel_is_the_whole_without_the_lines_of_the_others(stem: str, entry_point: str) -> None:
    whole, alone = (source.read(stem, name).split("\n") for name in (None, entry_point))
    assert len(alone) == len(whole), "or the compiler's messages name wrong lines"
    changed = [line for line, kept in zip(whole, alone, strict=True) if line != kept]
    assert len(changed) == len(source.entry_points(stem)) - 1
    assert set(source._kernels("\n".join(alone)).values()) == {entry_point}


def test_a_kernel_that_is_not_made_lists_those_that_are() -> None:
    with pytest.raises(
        LookupError, match=r"cuda/batch_norm_statistics\.cu makes no kernel bnk_x; it makes bnk_batch_.*_f32, bnk"
    ):
        source.read("batch_norm_statistics", "bnk_x")


def test_constants_stand_in_front_and_move_no_line() -> None:
    constants = ("batch", 64), ("subwarp_size", 8)
    plain, given = (source.read("fused_training", None, some) for some in ((), constants))
    assert given == f"#define BNK_CONSTANTS(a) ((a).batch = 64, (a).subwarp_size = 8)\n{plain}"
    assert plain.startswith('#line 1 "')
    one = source.read("fused_training", "bnk_fused_training_f32", (("batch", 64),))
    assert one.startswith("#define BNK_CONSTANTS(a) ((a).batch = 64)\n")


def test_a_kernel_compiles_alone(nvrtc: ModuleType) -> None:
    name = "bnk_batch_norm_backward_registers4_f32"
    assert list(nvrtc.resources(source.read("batch_norm_backward", name), 90)) == [name]
