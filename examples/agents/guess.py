"""An environment: a hidden number, and a tool that says whether a guess is too low or too high.

`reset` gets the columns of the data row and begins an episode; public methods are the model's
tools; `get_reward`, asked at the end, is the reward `environment`.
"""

from __future__ import annotations

from typing import Any


class Guess:
    """The number of a row's column `secret`, to be found in few guesses."""

    def reset(self, secret: int, **row: Any) -> str:
        """Begin: what is returned is shown to the model after the prompt."""
        self._secret = secret
        self._guesses = 0
        self._found = False
        return "I think of a number from 1 to 100. Guess it."

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: The guess.

        Returns:
            Whether the number is higher, lower or found.
        """
        self._guesses += 1
        if number == self._secret:
            self._found = True
            return "found"
        return "higher" if number < self._secret else "lower"

    def get_reward(self) -> float:
        """1 for the number in one guess, a tenth less for each further one; 0 where not found."""
        return max(0.1, 1.1 - self._guesses / 10) if self._found else 0.0
