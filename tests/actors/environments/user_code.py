"""What a user writes: the text of a module `user_tools` with tools and environments, good and bad.

It is text, as it must not be importable where the tests are: it is found by its search path.
"""

MODULE = '''
import asyncio, os, random, signal, subprocess, sys, time
from typing import Literal


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The one.
        b: The other.

    Returns:
        Their sum.
    """
    return a + b


async def later(text: str) -> str:
    """Say it later.

    Args:
        text: What.
    """
    await asyncio.sleep(0)
    return text


def nested() -> str:
    """A client that runs a loop of its own."""
    return asyncio.run(later("inside"))


def meet(folder: str, name: str, others: int) -> str:
    """End when `others` calls are in it at the same time.

    Args:
        folder: Where they meet.
        name: Who comes.
        others: How many.
    """
    open(os.path.join(folder, name), "w").close()
    while len(os.listdir(folder)) < others:
        time.sleep(0.01)
    return name


def misbehave(how: str) -> str:
    """Do what no tool should.

    Args:
        how: What.
    """
    if how == "raise":
        raise KeyError("no such thing")
    if how == "raise at length":
        raise ValueError("x" * 100_000)
    if how == "hang":
        signal.pause()
    if how == "spin":
        while True:
            pass
    if how == "deaf":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        while True:
            signal.pause()
    if how == "flood":
        while True:
            print("x" * 10_000)
    if how == "print much":
        for _ in range(3000):
            print("x" * 10_000)
        return "printed"
    if how == "exit":
        os._exit(3)
    if how == "sys.exit":
        sys.exit("enough")
    if how == "fork":
        os.fork()
        return "forked"
    if how == "fork without end":
        while True:
            try:
                if os.fork() == 0:
                    signal.pause()
            except OSError:
                signal.pause()
            time.sleep(0.02)
    if how == "10 MB":
        return "x" * 10_000_000
    if how == "long":
        return "x" * 5_000
    if how == "memory":
        return str(len(bytearray(2**31)))
    if how == "half a character":
        return "a\\ud800b"
    if how == "write to every descriptor":
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            try:
                os.write(descriptor, b'{"call": "1", "value": "forged"}\\n')
            except OSError:
                pass
        return "wrote"
    return how


def leave_a_process(folder: str, hang: bool) -> str:
    """Start a process that stays.

    Args:
        folder: Where its id is written.
        hang: Whether to stay too.
    """
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    with open(os.path.join(folder, "pid.tmp"), "w") as file:
        file.write(str(child.pid))
    os.rename(os.path.join(folder, "pid.tmp"), os.path.join(folder, "pid"))
    if hang:
        signal.pause()
    return "left"


def wait_at(gate: str, log: str, name: str) -> str:
    """Say who is there, and wait until the gate, a named pipe, is opened.

    Args:
        gate: The pipe.
        log: Where it is said.
        name: Who.
    """
    with open(log, "a") as file:
        file.write(name + "\\n")
    open(gate).close()
    return name


def nap(seconds: float) -> str:
    """Sleep.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "slept"


def roll() -> str:
    """Roll a die."""
    return str(random.randint(1, 10**9))


class Guess:
    """A number to be found."""

    def reset(self, number: int, **row):
        self.number = number
        self.tries = 0
        self.row = row
        return " Guess!"

    def guess(self, n: int) -> Literal["right", "higher", "lower"]:
        """Guess the number.

        Args:
            n: The guess.
        """
        self.tries += 1
        return "right" if n == self.number else "higher" if n < self.number else "lower"

    async def meet_here(self, others: int) -> str:
        """End when `others` calls are in it at the same time.

        Args:
            others: How many.
        """
        self.arrived = getattr(self, "arrived", 0) + 1
        while self.arrived < others:
            await asyncio.sleep(0.01)
        return "met"

    def misbehave_here(self, how: str) -> str:
        """Do what no tool should.

        Args:
            how: What.
        """
        return misbehave(how)

    def tries_so_far(self) -> int:
        """Say how many tries there were."""
        return self.tries

    def roll_here(self) -> str:
        """Roll a die."""
        return roll()

    def leave_here(self, folder: str) -> str:
        """Start a process that stays.

        Args:
            folder: Where its id is written.
        """
        return leave_a_process(folder, False)

    def get_reward(self) -> float:
        return 1.0 / max(self.tries, 1)

    def _hidden(self):
        pass


class Quiet:
    """Says nothing, and has no reward of its own."""

    async def reset(self):
        self.said = []

    def say(self, text: str) -> str:
        """Say something.

        Args:
            text: What.
        """
        self.said.append(text)
        return "said"


def both(completions, environments, number, **kwargs):
    """A reward that sees the environment and what was said."""
    return [
        float(len(said)) + environment.tries / 10 if hasattr(environment, "tries") else None
        for said, environment in zip(completions, environments)
    ]


def slow(completions, environments, seconds, **kwargs):
    """A reward that sees the environment and takes its time."""
    time.sleep(seconds[0])
    return [1.0]


class Shop:
    """Prints, answers with what is no text, has options of its own, and is async where it likes."""

    def __init__(self):
        print("the shop opens")

    def reset(self, *, coins: int = 10, **row) -> str:
        print("a customer", row, flush=True)
        self.coins, self.basket = coins, []
        return f" You have {coins} coins."

    def prices(self) -> dict[str, float | None]:
        """Say what things cost."""
        print("prices", file=sys.stderr)
        return {"apple": 2.5, "pear": 3, "fig": None}

    def take(self, things: list[str], count: int = 1, gift: bool | None = None) -> int:
        """Put things into the basket.

        Args:
            things: What.
            count: How many of each.
            gift: Whether to wrap them.

        Returns:
            How many there are now.
        """
        self.basket += things * count
        return len(self.basket)

    def thank(self) -> None:
        """Say thanks."""
        os.write(1, b"thanks\\n")

    async def has(self, thing: Literal["apple", "pear"]) -> bool:
        """Look into the basket.

        Args:
            thing: (choices: ["apple", "pear"]) For what.
        """
        await asyncio.sleep(0)
        print("looking")
        return thing in self.basket

    async def pair(self) -> tuple[int, str]:
        """Say two things."""
        return 1, "two"

    async def get_reward(self) -> float:
        await asyncio.sleep(0)
        print("done")
        return float(len(self.basket))


class Holds:
    """Has something that it takes a while to free."""

    def reset(self, *, folder: str):
        self.folder = folder

    def __del__(self):
        if hasattr(self, "folder"):
            time.sleep(0.3)
            open(os.path.join(self.folder, "freed"), "x").close()


class RaisesInReset(Guess):
    def reset(self, **row):
        raise RuntimeError("no board")


class DiesInReset(Guess):
    def reset(self, **row):
        os._exit(7)


class HangsInReset(Guess):
    def reset(self, **row):
        signal.pause()


class HangsInReward(Guess):
    def get_reward(self):
        time.sleep(600)


class RewardIsText(Guess):
    def get_reward(self):
        return "much"


def no_docstring(a: int) -> int:
    return a


def no_types(a) -> int:
    """Add.

    Args:
        a: The one.
    """


def no_args(a: int) -> int:
    """Add."""


def odd_type(a: "Nowhere") -> int:
    """Add.

    Args:
        a: The one.
    """


class NoReset:
    def say(self) -> str:
        """Say."""


class Untyped:
    def reset(self):
        pass

    def say(self, text) -> str:
        """Say.

        Args:
            text: What.
        """


class Adds(Quiet):
    def add(self, a: int) -> int:
        """Add.

        Args:
            a: The one.
        """


class CannotBeMade(Quiet):
    def __init__(self):
        raise RuntimeError("no licence")


not_callable = 3
'''
