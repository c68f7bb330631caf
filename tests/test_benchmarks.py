"""The benchmarks' own arithmetic, their refusal of wrong results, and the way from a run to a table."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("numpy")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def tiny():
    from registry import Layer

    return Layer("gru", "b2_t3_8", 2, 3, 8, 8)


def measure(tmp_path, workload, providers, *arguments):
    import run

    path = tmp_path / "rows.csv"
    threads = str(torch.get_num_threads())
    argv = ["--seconds", "0", "--threads", threads, "--output", str(path), *arguments]
    return run.main(argv, [workload], {provider.name: provider for provider in providers}), path


@pytest.mark.parametrize(
    ("op", "name", "mode", "gflop"),
    [
        ("gru", "b1_t1_256", "forward", 0.000786),
        ("lstm", "b64_t35_650", "forward", 15.1),
        ("gru", "b32_t128_i128_h256", "training", 7.25),
        ("lstm", "b32_t64_256_2layer", "training", 12.9),
        ("gru", "b32_t64_256_bi", "forward", 3.22),
        ("lstm", "b32_t128_256_varlen", "forward", 2.28),
        ("gru", "cell_b32_256_x50", "training", 3.77),
        ("gru", "LM-A", "training", 35.1),
        ("lstm", "LM-B", "forward", 12.1),
        ("lstm", "CLS", "training", 7.55),
    ],
)
def test_work_counted(op, name, mode, gflop):
    from registry import WORKLOADS

    (workload,) = (w for w in WORKLOADS if (w.op, w.name) == (op, name))
    assert float(f"{workload.gflop(mode):.3g}") == pytest.approx(gflop, rel=0.002)


def test_every_workload_is_named_once_and_has_a_peer():
    from registry import OPS, WORKLOADS
    from targets import PEERS, TARGETS

    names = [(w.op, w.name) for w in WORKLOADS]
    assert len(set(names)) == len(names)
    assert set(PEERS) <= {name for name in names if name[0] in OPS}
    assert {(target.op, target.workload) for target in TARGETS} <= set(names)


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_wrong_provider_is_refused(tmp_path, capsys, tiny, mode):
    import rows
    from providers import PROVIDERS, Provider

    def wrong(workload, mode, threads):
        right = PROVIDERS["torch"].prepare(workload, mode, threads)
        return lambda: [*(result.clone() for result in right()[:-1]), right()[-1] * 1.01]

    providers = [PROVIDERS["torch"], Provider("wrong", "torch", "torch", wrong)]
    status, path = measure(tmp_path, tiny, providers, "--modes", mode)
    assert status == 1
    assert f"REFUSED wrong on gru/b2_t3_8 {mode}" in capsys.readouterr().out
    assert [row.provider for row in rows.read(path)] == ["torch"]


def test_missing_provider_is_skipped(tmp_path, capsys, tiny):
    from providers import PROVIDERS, Provider

    status, _ = measure(tmp_path, tiny, [PROVIDERS["torch"], Provider("absent", "no-such-package", "torch", None)])
    assert status == 0
    assert "skipped absent: no-such-package is not installed" in capsys.readouterr().out


def test_run_to_table(tmp_path, capsys, tiny):
    import report
    import rows
    from providers import PROVIDERS

    status, path = measure(tmp_path, tiny, [PROVIDERS["torch"], PROVIDERS["fastlm"]])
    assert status == 0
    found = rows.read(path)
    assert [(row.provider, row.mode) for row in found] == [
        (provider, mode) for mode in ("forward", "training") for provider in ("torch", "fastlm")
    ]
    assert all(row.p20 <= row.p50 <= row.p80 for row in found)
    assert found[0].torch_ratio == 1

    summary, tables = pages = tmp_path / "summary.md", tmp_path / "tables.md"
    for page in pages:
        page.write_text(f"above\n{report.BEGIN}\nprevious table\n{report.END}\nbelow\n")
    assert report.main([str(path), "--summary", str(summary), "--tables", str(tables)]) == 0
    for page in pages:
        text = page.read_text()
        assert text.startswith("above")
        assert text.endswith("below\n")
        assert "previous table" not in text
    assert tables.read_text().count("| gru b2_t3_8 |") == 2
    ratio = f"{found[0].p50 / found[1].p50:.2f}"
    assert ratio in summary.read_text().partition("| GRU layers and cells | 1 |")[2].split("|")[0]

    capsys.readouterr()
    report.main([str(path), "--check"])
    assert "gru/b2_t3_8 forward against torch: " in capsys.readouterr().out


def test_every_workload_has_one_line_in_the_summary():
    from registry import WORKLOADS
    from report import SUMMARY, in_summary

    for workload in WORKLOADS:
        lines = [kind for kind, pattern in SUMMARY.items() if in_summary(pattern, workload.op, workload.name)]
        assert len(lines) == (workload.op != "gemm" and not workload.name.endswith("_bf16")), (workload, lines)


def test_newest_run_is_taken_whole(tmp_path, tiny):
    import dataclasses

    import rows
    from providers import PROVIDERS

    _, path = measure(tmp_path, tiny, [PROVIDERS["torch"], PROVIDERS["fastlm"]], "--modes", "forward")
    torch_row, _ = found = rows.read(path)
    later = dataclasses.replace(torch_row, date="9999")
    assert rows.latest([later, *found]) == {("gru", "b2_t3_8", "forward"): {"torch": later}}


def test_peers_that_took_no_part_count_through_torch(tmp_path, tiny):
    import dataclasses

    import rows
    import targets
    from providers import PROVIDERS

    _, path = measure(tmp_path, tiny, [PROVIDERS["torch"]], "--modes", "training")
    (row,) = rows.read(path)
    group = {
        "torch": dataclasses.replace(row, workload="b20_t70_1150", p50=143.0),
        "fastlm": dataclasses.replace(row, workload="b20_t70_1150", provider="fastlm", p50=130.0, torch_ratio=1.1),
    }
    found = [v for v in targets.verdicts({("gru", "b20_t70_1150", "training"): group}) if "against" in v.text]
    assert [verdict.reached for verdict in found] == [True, False]  # torch is beaten, JAX (1.43 times torch) is not
    assert "jax (through torch): MISSED, must be 1.13 times as fast" in found[1].text
