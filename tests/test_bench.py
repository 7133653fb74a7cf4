"""The script behind the README's figures keeps running."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"


def test_a_quick_run_reports_the_server_and_the_bare_model(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--loads", "short-1", "--soak", "40", "--json", "report.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    load = report["loads"]["short-1"]
    assert load["requests"] > 0 and load["errors"] == 0
    assert load["ratio"] == load["inputs_per_s"] / load["bare_inputs_per_s"]
    assert report["soak"]["requests"] == 40
    assert "| short-1 |" in done.stdout
