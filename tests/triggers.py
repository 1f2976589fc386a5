"""Triggers that warn by the calendar: what follows a warning must not hang on how a tiny policy happens to learn."""

from npo_core.method.trigger import PlateauTrigger, PlateauWarning


def calendar(period: int) -> type[PlateauTrigger]:
    """The package's trigger, but that it warns in every step that `period` divides."""

    class Calendar(PlateauTrigger):
        def update(self, step, reward, entropy):
            super().update(step, reward, entropy)
            return PlateauWarning(step, reward, 0.0, entropy, -0.5) if step % period == 0 else None

    return Calendar
