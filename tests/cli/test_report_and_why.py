import json
from pathlib import Path

from esper.nissa.run.journal import EVENTS_FILE


def test_report_writes_a_file_and_says_where(esper, run: Path) -> None:
    ran = esper("report", run)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert Path(ran.stdout.strip()) == run / "report.html"
    assert (run / "report.html").stat().st_size > 10_000


def test_report_writes_where_it_is_told(esper, run: Path, tmp_path: Path) -> None:
    assert esper("report", run, "--out", tmp_path / "here.html").returncode == 0
    assert (tmp_path / "here.html").exists()


def test_report_as_json_holds_the_totals(esper, run: Path) -> None:
    told = json.loads(esper("report", run, "--json").stdout)
    assert told["kept"] == 2
    assert told["parameters_after"] == 1138
    assert told["report"] == str(run / "report.html")


def test_a_folder_without_a_run_is_one_line_and_code_2(esper, tmp_path: Path) -> None:
    ran = esper("report", tmp_path / "nothing")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("esper: no run in")
    assert ran.stderr.count("\n") == 1


def test_why_explains_one_decision_or_all(esper, run: Path) -> None:
    one = esper("why", run, 2)
    assert one.returncode == 0
    assert one.stdout.startswith("Decision 2 at step 270: widen conv1>conv2 by 4 — refused")
    assert esper("why", run).stdout.count("Decision ") == 4


def test_why_as_json_is_a_list_of_decisions(esper, run: Path) -> None:
    (story,) = json.loads(esper("why", run, 4, "--json").stdout)
    assert story["verdict"] == "kept"
    assert story["widened"]["edits"][0] == {"tensor": "conv1.weight", "axis": 0, "old": 4, "new": 8}


def test_why_names_the_decisions_there_are(esper, run: Path) -> None:
    ran = esper("why", run, 7)
    assert ran.returncode == 2
    assert "no decision 7; its decisions: 1, 2, 3, 4" in ran.stderr


def test_why_of_a_run_without_decisions(esper, run: Path) -> None:
    path = run / EVENTS_FILE
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    assert esper("why", run).stdout == "The run took no decision.\n"
