"""The line of progress: there while the engine waits, gone when it does not."""

import io

from bcmi_beamline.prompt import ProgressLine


class Move:
    """A status that tells its watcher where a motor is."""

    def watch(self, follow):
        follow(name="nanogoniometer_z", current=1.5, target=9.0, unit="um")


class Plain:
    """A status that nobody can watch."""


def test_a_move_is_shown_while_the_engine_waits_and_erased_after():
    stream = io.StringIO()
    line = ProgressLine(stream)
    line.scan(0.5, "rocking: point 3 of 6")
    line([Move(), Plain()])
    shown = stream.getvalue()
    assert "nanogoniometer_z 1.5 -> 9 um" in shown
    assert "rocking: point 3 of 6" in shown
    line(None)
    assert stream.getvalue().endswith("\r\x1b[2K")


def test_nothing_is_erased_where_nothing_was_drawn():
    stream = io.StringIO()
    line = ProgressLine(stream)
    line([Plain()])
    line(None)
    assert stream.getvalue() == ""


def test_news_after_the_wait_is_not_drawn():
    stream = io.StringIO()
    line = ProgressLine(stream)
    follower = []

    class Late:
        def watch(self, follow):
            follower.append(follow)

    line([Late()])
    line(None)
    follower[0](name="x", current=0.0, target=1.0)
    assert stream.getvalue() == ""
