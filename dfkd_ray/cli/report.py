"""`dfkd-ray report`."""

from typing import Annotated

import typer

from dfkd_ray.cli.streams import say


def report(
    place: Annotated[str, typer.Argument(help="folder or URI (s3://, gs://, …) with the results of a sweep")],
    out: Annotated[str | None, typer.Option(help="HTML file to write; default: PLACE/report.html")] = None,
) -> None:
    """Write the report of a sweep: one HTML page that works offline, and its figures as PNG and SVG beside it."""
    from dfkd_ray import report as reports

    written = reports.write(place, out)
    say(f"report: {written.folder / written.name} ({written.size_bytes / 1e6:.2f} MB)")
    if written.figures:
        say(f"figures: {len(written.figures) // 2}, each as SVG and PNG, in {written.figure_folder}")
