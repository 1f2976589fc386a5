"""S over the distance in one panel: is there a distance that is neither small nor large?"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..method.quantities import SIGNALS
from .estimates import interval
from .signal import origin_title, read_measurement, rows_ahead
from .style import COLORS, WIDTH, canvas, settle, style


def signal_over_distance(
    folders: str | Path | Sequence[str | Path], origin: int = 0, signal: str = "signal_kl"
) -> Figure:
    """S = Q/V over the distance from one policy, one panel, its maximum marked (paper: Figure 2b).

    Of one measurement with its interval over prompts; of several, one a seed, their mean with Student's t over seeds.

    Args:
        folders: Folder of a signal measurement, or one for each seed; distances that not all of them have are left out.
        origin: Policy step of the policy that would learn.
        signal: Which S, the name of one of `method.quantities.SIGNALS` that was measured.

    Raises:
        FileNotFoundError: A folder holds no finished measurement.
        ValueError: No folder, an origin or an S that a folder does not have, or no distance that all have.
    """
    given = [folders] if isinstance(folders, str | Path) else list(folders)
    if not given:
        raise ValueError("folders is empty; give the folder of a measurement, or one for each seed.")
    curves = [_signal_of(folder, origin, signal) for folder in given]
    shared = sorted(set.intersection(*(set(curve.index) for curve in curves)))
    if not shared:
        raise ValueError(f"The {len(given)} measurements share no distance from policy step {origin}.")
    values = np.array([curve.loc[shared, signal] for curve in curves], dtype=float)
    if len(given) == 1:
        low, high = (curves[0].loc[shared, f"{signal}_{end}"] for end in ("low", "high"))
        mean, band = values[0], "95 % interval over prompts, one run"
    else:
        mean, low, high = np.array([interval(column) for column in values.T]).T
        band = f"95 % interval over {len(given)} seeds"
    best = int(np.argmax(mean))
    edge = best in (0, len(shared) - 1)
    with style():
        figure, ((axes,),) = canvas(1, 1, (WIDTH / 2, 2.7))
        axes.fill_between(shared, low, high, color=COLORS[1], alpha=0.2, lw=0, label=band)
        for row in values if len(given) > 1 else []:
            axes.plot(shared, row, color=COLORS[1], lw=0.6, alpha=0.5)
        axes.plot(shared, mean, "o-", color=COLORS[1], ms=3, lw=1.6)
        look = {"marker": "*", "ms": 12, "mec": "black", "mfc": "white" if edge else COLORS[1], "ls": "", "zorder": 5}
        text = f"Δ* = {shared[best]:g}" + (", at the edge: no maximum inside" if edge else "")
        axes.plot(shared[best], mean[best], label=text, **look)
        axes.set_ylim(0, None)
        axes.set_title(origin_title(origin))
        axes.set_xlabel("distance Δ (policy steps)")
        axes.set_ylabel("signal S = Q / V")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.legend(loc="outside lower center", ncols=1, frameon=False)
    return settle(figure)


def _signal_of(folder: str | Path, origin: int, signal: str) -> pd.DataFrame:
    table, _ = read_measurement(folder)
    rows = rows_ahead(table, folder)
    if signal not in rows:
        names = ", ".join(one.name for one in SIGNALS if one.name in rows)
        raise ValueError(f"{folder} holds no {signal!r}; available: {names}.")
    own = rows[rows["origin"] == origin].set_index("distance")
    if own.empty:
        raise ValueError(f"{folder} measures from {sorted(rows['origin'].unique())}, not from policy step {origin}.")
    return own
