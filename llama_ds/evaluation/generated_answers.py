"""What counts as an answer in a generated text, and when two answers are the same: words, numbers, LaTeX, programs."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
WRAPPERS = ("text", "mbox", "mathrm", "textbf", "mathbf")


def plain_words(text: str) -> str:
    """Return an answer in lower case, without articles, punctuation and double spaces (paper, appendix A)."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


def final_number(text: str) -> str:
    """Return the number behind "####", as GSM8k's solutions have it, else the last one of the text; "" without any."""
    _, marked, behind = text.partition("####")
    found = NUMBER.findall(behind) if marked else []
    numbers = found[:1] or NUMBER.findall(text)[-1:]
    if not numbers:
        return ""
    try:
        value = Decimal(numbers[0].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return ""
    return f"{value.normalize():f}"


def boxed_answer(text: str) -> str:
    """Return the content of the last \\boxed{...} of a solution of MATH in normal form, "" without one."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return ""
    behind = text[start:].partition("boxed" if text.startswith(r"\boxed", start) else "fbox")[2].lstrip()
    return normal_latex(_group(behind) if behind.startswith("{") else behind.partition("$")[0].partition(" ")[0])


def _group(text: str) -> str:
    """Return what is between the first brace and the one that closes it, "" if none does."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:at]
    return ""


def normal_latex(answer: str) -> str:
    """Return an answer of MATH without what does not change its value: spaces, sizes, units, ways to write a fraction.

    The rules are those of Hendrycks et al. (2021), with which MATH is usually scored: two answers are the same if their
    normal forms are.
    """
    found = answer.replace("\n", "").replace("{,}", "").replace(r"\!", "").replace(r"\left", "").replace(r"\right", "")
    found = re.sub(r"\\[td]frac", r"\\frac", found)
    found = re.sub(r"\^\s*(\\circ|\{\s*\\circ\s*\})", "", found).replace(r"\$", "").replace(r"\%", "").replace("%", "")
    found = re.sub(r"(?<=[\d}])\s*\\text\{\s[^{}]*\}$", "", found.strip())  # a unit
    for wrapper in WRAPPERS:
        found = re.sub(rf"\\{wrapper}\{{([^{{}}]*)\}}", r"\1", found)
    found = re.sub(r"\\[,;: ]", "", found).replace("$", "").strip().rstrip(".")
    left, equals, right = found.partition("=")
    if equals and len(left.strip()) <= 2:
        found = right
    found = re.sub(r"(?<=\d),(?=\d{3}\b)", "", found).replace(" ", "")
    found = re.sub(r"\\sqrt([^{\[])", r"\\sqrt{\1}", found)
    found = re.sub(r"\\frac([^{])", r"\\frac{\1}", found)
    found = re.sub(r"(\\frac\{[^{}]*\})([^{])", r"\1{\2}", found)
    found = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", found)
    found = re.sub(r"(?<![\d.])\.(?=\d)", "0.", found)
    return re.sub(r"(\d+)\.0+$", r"\1", found)


def majority(answers: Sequence[str]) -> str:
    """Return the most frequent answer, of equally frequent ones the first; an empty one counts only if all are."""
    counts = Counter(answer for answer in answers if answer)
    return max(counts, key=lambda answer: counts[answer]) if counts else ""


def pass_at(k: int, count: int, passed: int) -> float:
    """Return the unbiased estimate of the probability that one of `k` samples passes (Chen et al. 2021, equation 1).

    `passed` of `count` samples did; 1 - C(count - passed, k) / C(count, k).
    """
    return 1 - math.comb(count - passed, k) / math.comb(count, k)
