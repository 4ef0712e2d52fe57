"""A machine for tuning whose times are made up."""


class FakeMachine:
    """Times by choice, 100 µs if none is given: a number, or a list of one per measurement. Each costs a second."""

    def __init__(self, times=None, wrong=None, lost_at=None):
        self.given, self.wrong_choices, self.lost_at = times or {}, wrong or {}, lost_at
        self.seconds, self.measured, self.begun, self.is_lost = 0.0, [], [], False
        self.settled = {}

    def now(self):
        return self.seconds

    def begin(self, target, settled):
        self.begun.append(target.key)
        self.settled[target.key] = dict(settled)

    def wrong(self, choice):
        assert not self.is_lost, "ran on a lost device"
        if choice == self.lost_at:
            self.is_lost = True
            raise RuntimeError("an illegal memory access was encountered")
        found = self.wrong_choices.get(choice, "")
        if isinstance(found, BaseException):
            raise found
        return found

    def times(self, choices):
        assert not self.is_lost, "timed on a lost device"
        self.seconds += 1
        self.measured.append(list(choices))
        found = {}
        for choice in choices:
            given = self.given.get(choice, 100e-6)
            found[choice] = given.pop(0) if isinstance(given, list) else given
        return found

    def trouble(self):
        return "an illegal memory access was encountered" if self.is_lost else ""
