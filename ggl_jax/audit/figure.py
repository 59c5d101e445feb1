"""The picture of an audit: originals, reconstructions under each defense, and the controls."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ggl_jax import files
from ggl_jax.audit.run import AuditResult

#: More rows than this are not readable in one figure; the PNGs of all of them are on disk.
MAX_ROWS = 8


def draw(result: AuditResult, path: Path, *, title: str = "") -> None:
    """Write the figure: one row per image, one column per defense, with scores under each.

    Columns: the private image, the reconstruction under each defense, and the three controls (the
    best of the prior's random samples, picked with the private image in hand; the prior's mean
    image; the prior's ceiling, its closest fit to the private image).

    Args:
        result: of :func:`ggl_jax.audit`, with at least one row.
        path: where to write the PNG.
        title: one line above the figure.
    """
    names = list(dict.fromkeys(row["image"] for row in result.rows))[:MAX_ROWS]
    defenses = list(dict.fromkeys(row["defense"] for row in result.rows))
    cells = {
        (row["image"], row["defense"]): (row, image)
        for row, image in zip(result.rows, result.reconstructions, strict=True)
    }
    headings = ["private image", *defenses, "best random\nsample", "mean image", "ceiling"]
    columns, rows = len(headings), len(names)
    figure = Figure(figsize=(1.45 * columns + 0.4, 1.95 * rows + 0.7), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)

    def show(axis, image, caption):
        image = np.clip(np.asarray(image), 0, 1)
        axis.imshow(
            image.squeeze(-1) if image.shape[-1] == 1 else image,
            cmap="gray",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axis.set_xlabel(caption, fontsize=7)

    for r, name in enumerate(names):
        control = result.controls[name]
        show(axes[r, 0], result.originals[name], name)
        for c, defense in enumerate(defenses, start=1):
            if (name, defense) in cells:
                row, image = cells[name, defense]
                show(axes[r, c], image, f"{_db(row['psnr'])}\nSSIM {row['ssim']:.2f}")
        scores = control.scores
        show(axes[r, -3], control.best_sample, _db(scores["psnr_control_best"]))
        show(axes[r, -2], control.mean_image, _db(scores["psnr_mean_image"]))
        show(axes[r, -1], control.ceiling, _db(scores["psnr_ceiling"]))
    for c, heading in enumerate(headings):
        axes[0, c].set_title(heading, fontsize=8)
    # The controls are no results of the attack: set them apart.
    for r in range(rows):
        for c in (-3, -2, -1):
            axes[r, c].set_facecolor("0.9")
            for spine in axes[r, c].spines.values():
                spine.set_visible(True)
                spine.set_color("0.6")
    files.write_figure(path, figure)


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
