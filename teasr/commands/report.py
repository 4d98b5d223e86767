"""`teasr report`: write a report on several evaluations, with published results and before/after sliders."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from teasr.config import presets
from teasr.util import command_line

if TYPE_CHECKING:
    from teasr.evaluation.report import Result

SUMMARY = "write a report on several evaluations: our rows beside published ones, metrics over steps, sliders"
EXAMPLES = """examples:
  {prog} runs/demo/eval/heldout runs/mine/eval/RealSR --out report
  {prog} --mlflow sqlite:///runs/mlflow.db --experiment teasr-demo --out report

Takes result folders of `teasr benchmark`, or the results that it logged to MLflow. Writes report.md and report.html
to --out; the HTML page is self-contained.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument("folders", nargs="*", type=Path, help="result folders of teasr benchmark")
    parser.add_argument(
        "--mlflow", metavar="URI", help="tracking URI of an MLflow store to read results from; needs --experiment"
    )
    parser.add_argument("--experiment", metavar="NAME", help="experiment to read from the store of --mlflow")
    parser.add_argument(
        "--published",
        type=Path,
        help="YAML file of published scores (default: the one that comes with teasr)",
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="output folder (default: report)")
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr report") -> int:
    """Write the report; returns the exit code."""
    options = parser(prog).parse_args(arguments)
    return command_line.run("the report", lambda: _report(options))


def _report(options: argparse.Namespace) -> None:
    from datetime import UTC, datetime

    from teasr.evaluation import report, report_page
    from teasr.tracking.environment import command_line_of_process, git_commit
    from teasr.util.files import write_atomic

    with tempfile.TemporaryDirectory() as place:
        results = [report.Result.read(folder) for folder in options.folders]
        if options.mlflow:
            results += from_mlflow(options.mlflow, options.experiment, Path(place))
        if not results:
            raise ValueError(
                "nothing to report: give result folders of `teasr benchmark`, or --mlflow and --experiment"
            )
        blocks = report.read_published(options.published or presets.names(presets.SETS)["published"])
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out / "report.md", report.markdown(results, blocks).encode())
        made = {"written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "command": command_line_of_process()}
        made |= {"commit": git_commit()}
        write_atomic(options.out / "report.html", report_page.page(results, blocks, made).encode())
    print(f"{options.out / 'report.md'}\n{options.out / 'report.html'}")


def from_mlflow(uri: str, experiment: str | None, place: Path) -> list[Result]:
    """Download the results that `teasr benchmark` has logged, newest run first.

    Raises ValueError when the store or the experiment does not exist.
    """
    from teasr.evaluation.report import Result
    from teasr.tracking.mlflow_results import download_results

    return [
        Result.read(folder, name, {"link": run.link, "command": run.command})
        for name, folder, run in download_results(uri, experiment, place)
    ]
