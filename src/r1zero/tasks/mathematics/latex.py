r"""LaTeX, and what people write instead of it, as a list of tokens in one spelling.

``\dfrac12``, ``\frac{1}{2}`` and the character ½ give the same tokens, as do ``1,234``, ``1{,}234`` and ``1\,234``.
Linear in the length of the text.
"""

import re
from collections.abc import Container
from dataclasses import dataclass, replace

from r1zero.tasks.mathematics.units import ADJECTIVES, UNITS
from r1zero.tasks.mathematics.values import Unreadable

MOST_CHARACTERS = 1000
MOST_DEPTH = 24


_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS: dict[int, int | str | None] = {
    **_FULL_WIDTH,
    **_INVISIBLE,
    **{ord(char): " " for char in "\u00a0\u2002\u2003\u2004\u2005\u2007\u3000"},
    **{ord(char): r"\," for char in "\u2006\u2009\u200a\u202f"},
    **{ord(char): "-" for char in "\u2212\u2010\u2011"},
    **{ord(superscript): f"^{{{digit}}}" for digit, superscript in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{ord(subscript): f"_{{{digit}}}" for digit, subscript in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    **{
        ord(char): latex
        for char, latex in {
            "×": r"\times ",
            "·": r"\cdot ",
            "⋅": r"\cdot ",
            "*": r"\cdot ",
            "∗": r"\cdot ",
            "÷": "/",
            "∕": "/",
            "⁄": "/",
            "½": r" \frac{1}{2}",
            "⅓": r" \frac{1}{3}",
            "⅔": r" \frac{2}{3}",
            "¼": r" \frac{1}{4}",
            "¾": r" \frac{3}{4}",
            "⅕": r" \frac{1}{5}",
            "⅙": r" \frac{1}{6}",
            "⅛": r" \frac{1}{8}",
            "⅜": r" \frac{3}{8}",
            "⅝": r" \frac{5}{8}",
            "⅞": r" \frac{7}{8}",
            "°": r"^\circ ",
            "≤": r"\le ",
            "≥": r"\ge ",
            "≠": r"\ne ",
            "≈": r"\approx ",
            "∞": r"\infty ",
            "√": r"\sqrt ",
            "±": r"\pm ",
            "∪": r"\cup ",
            "∈": r"\in ",
            "ℝ": r"\mathbb{R}",
            "∅": r"\emptyset ",
            "π": r"\pi ",
            "θ": r"\theta ",
            "α": r"\alpha ",
            "β": r"\beta ",
            "γ": r"\gamma ",
            "λ": r"\lambda ",
            "μ": r"\mu ",
            "ω": r"\omega ",
            "φ": r"\varphi ",
            "’": "'",
            "′": "'",
            "，": ", ",
            "、": ", ",
        }.items()
    },
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _commands(text: str) -> frozenset[str]:
    return frozenset(f"\\{name}" for name in text.split())


GREEK = _names(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho "
    "sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi "
    "Omega ell hbar"
)
_APPLIED = _names("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp min max gcd lcm det")
APPLIED = frozenset(f"\\{name}" for name in _APPLIED)  # what follows one of these is its argument
_BUILT = _names("sqrt frac binom lfloor rfloor lceil rceil")
_SYMBOLS = _names("pi infty cdot times div emptyset mathbb")
KNOWN_COMMANDS = frozenset(f"\\{name}" for name in GREEK | _APPLIED | _BUILT | _SYMBOLS)
RELATIONS = {
    "<": "<",
    ">": ">",
    "=": "=",
    r"\lt": "<",
    r"\gt": ">",
    r"\le": r"\le",
    r"\leq": r"\le",
    r"\leqslant": r"\le",
    r"\ge": r"\ge",
    r"\geq": r"\ge",
    r"\geqslant": r"\ge",
    r"\in": r"\in",
    r"\ne": r"\ne",
    r"\neq": r"\ne",
}
_RENAMED = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\dbinom": r"\binom",
    r"\tbinom": r"\binom",
    r"\lor": r"\or",
    r"\vee": r"\or",
    r"\land": r"\and",
    r"\wedge": r"\and",
    r"\ast": r"\cdot",
    r"\varnothing": r"\emptyset",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lparen": "(",
    r"\rparen": ")",
    r"\colon": ":",
    r"\degree": r"\circ",
    r"\textdegree": r"\circ",
    r"\vert": "|",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\mid": "|",
}
_TEXT_COMMANDS = _commands("text textbf textit textrm textnormal textup mathrm mbox hbox operatorname mathit")
_STYLES = _commands("mathbf boldsymbol bm mathsf vec overrightarrow underline")
_COLOURS = _commands("color textcolor")
_IGNORED = _commands(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle limits "
    "nolimits rm bf it tiny scriptsize footnotesize small normalsize large Large LARGE huge Huge boxed fbox"
)
_SPACES = frozenset((*(f"\\{char}" for char in ",;:! >"), r"\quad", r"\qquad", r"\thinspace", r"\enspace", "~"))
_PLAIN_FUNCTIONS = _names("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp sqrt pi")
_CONNECTIVES = {"or": r"\or", "and": r"\and"}

_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9.]))?)"
    r"|(?P<command>\\(?:[A-Za-z]+|.))"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<space>\s+)"
    r"|(?P<other>.)",
    re.DOTALL,
)
_IN_TEXT = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?)|(?P<word>[^\W\d_]+(?:'[^\W\d_]+)?)|(?P<space>[\s~]+)|(?P<other>.)"
)
OPENING = {
    "(": ")",
    "[": "]",
    r"\{": r"\}",
    "{": "}",
    r"\langle": r"\rangle",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
}
CLOSING = frozenset(OPENING.values())
SIGNS = frozenset("+-")


@dataclass(frozen=True)
class Token:
    """kind: number, word, letter, command or punctuation. `spaced`: whether a space stands before it."""

    kind: str
    text: str
    spaced: bool = False
    thin: bool = False  # the space is one of those that group digits


def _tokens(text: str) -> list[Token]:
    text = text[: MOST_CHARACTERS + 1].translate(_CHARACTERS)
    if len(text) > MOST_CHARACTERS:
        raise Unreadable(f"longer than {MOST_CHARACTERS} characters")
    found: list[Token] = []
    spaced = thin = False
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Unreadable(f"the character {text[at]!r}")
        at = match.end()
        kind, part = str(match.lastgroup), match[0]
        part = _RENAMED.get(part, part)
        if kind == "space" or part in _IGNORED:
            spaced = spaced or kind == "space"
            continue
        if part in _SPACES:
            thin = thin or not spaced
            spaced = True
            continue
        if part in _COLOURS:
            _, at = _argument(text, at)
            continue
        if part in _TEXT_COMMANDS or part in _STYLES:
            content, at = _argument(text, at)
            # A style changes how mathematics looks; a text command holds words.
            new = _words(content) if part in _TEXT_COMMANDS else _tokens(content)
            found += [replace(new[0], spaced=True), *new[1:]] if new else []
            spaced, thin = True, False
            continue
        if kind == "letters":
            found += _letters(part, spaced)
        else:
            found.append(
                Token(
                    "number" if kind == "number" else "command" if part[0] == "\\" else "punctuation",
                    part,
                    spaced,
                    thin,
                )
            )
        spaced = thin = False
    return found


def is_whole(text: str) -> bool:
    """Whether the text is digits 0 to 9: str.isdigit takes ① and ² as well."""
    return text.isascii() and text.isdigit()


def _argument(text: str, at: int) -> tuple[str, int]:
    """The braced argument that begins at `at`, without inner braces, and where it ends."""
    match = re.compile(r"\s*\{([^{}]*)\}").match(text, at)
    if match is None:
        raise Unreadable("a text command without its text")
    return match[1], match.end()


def _words(content: str) -> list[Token]:
    found: list[Token] = []
    spaced = False
    for match in _IN_TEXT.finditer(content.replace("$", " ")):
        if match.lastgroup == "space":
            spaced = True
            continue
        text = match[0]
        if match.lastgroup == "word":
            text = _CONNECTIVES.get(text.lower(), text)
        kind = "command" if text[0] == "\\" else str(match.lastgroup)
        found.append(Token("punctuation" if kind == "other" else kind, text, spaced))
        spaced = False
    return found


def _letters(run: str, spaced: bool) -> list[Token]:
    """Letters outside a text command: a known word, or symbols that stand side by side."""
    if run in _CONNECTIVES:
        return [Token("command", _CONNECTIVES[run], spaced)]
    if run in _PLAIN_FUNCTIONS:
        return [Token("command", f"\\{run}", spaced)]
    if (
        (len(run) > 3 and not run.isupper())
        or (len(run) > 1 and run.lower() in UNITS)
        or (len(run) > 1 and run.lower() in ADJECTIVES)
    ):
        return [Token("word", run, spaced)]
    return [Token("letter", letter, spaced and index == 0) for index, letter in enumerate(run)]


def _check_balance(tokens: list[Token]) -> None:
    stack: list[str] = []
    for token in tokens:
        if token.kind == "word" or token.kind == "number":
            continue
        if token.text in OPENING:
            stack.append(OPENING[token.text])
            if len(stack) > MOST_DEPTH:
                raise Unreadable(f"nested more than {MOST_DEPTH} deep")
        elif token.text in CLOSING:
            if not stack:
                raise Unreadable("a closing bracket too many")
            expected = stack.pop()
            if expected != token.text and {expected, token.text} != {")", "]"}:
                raise Unreadable("brackets that do not match")
    if stack:
        raise Unreadable("a bracket that is never closed")


def _grouped_digits(tokens: list[Token]) -> list[Token]:
    """1,234 and 1{,}234 and 1\\,234 as one number. A bare comma groups digits only outside brackets."""
    found: list[Token] = []
    depth = index = 0
    while index < len(tokens):
        token = tokens[index]
        if token.kind == "punctuation" or token.kind == "command":
            if token.text in ("(", "[", r"\{"):
                depth += 1
            elif token.text in (")", "]", r"\}"):
                depth -= 1
        if token.kind == "number" and re.fullmatch(r"[1-9][0-9]{0,2}", token.text):
            end, digits = _run_of_groups(tokens, index, bare=depth == 0)
            if end > index + 1:
                found.append(replace(token, text=digits))
                index = end
                continue
        found.append(token)
        index += 1
    return found


def _run_of_groups(tokens: list[Token], index: int, bare: bool) -> tuple[int, str]:
    """Where the groups of three digits that begin at `index` end, and all their digits; (index, "") for none."""
    digits, at = tokens[index].text, index + 1
    while at < len(tokens):
        if [each.text for each in tokens[at : at + 3]] == ["{", ",", "}"]:
            group = at + 3
        elif tokens[at].text == "," and not tokens[at].spaced:
            group = at + 1
            if group < len(tokens) and not tokens[group].thin and (not bare or tokens[group].spaced):
                return (index, "") if at == index + 1 else (at, digits)
        elif tokens[at].kind == "number" and tokens[at].thin:
            group = at
        else:
            break
        if group >= len(tokens) or tokens[group].kind != "number":
            break
        part = re.fullmatch(r"([0-9]{3})(\.[0-9]*)?", tokens[group].text)
        if part is None:
            return index, ""  # 1,200,30 is a list
        digits, at = digits + tokens[group].text, group + 1
        if part[2]:
            break
    return at, digits


def prepared(text: str) -> list[Token]:
    tokens = _tokens(_without_dollars(text.strip().removesuffix("\\")))  # what is left of a closing "\\ "
    _check_balance(tokens)
    return _trimmed(_sequence(_grouped_digits(tokens), 0, 0, closed=False)[0])


_DOLLAR = re.compile(r"(?<!\\)\$")


def _without_dollars(text: str) -> str:
    if "\\(" in text or "\\[" in text:
        text = re.sub(r"\\[()\[\]]", " ", text)
    if len(_DOLLAR.findall(text)) % 2 and re.match(r"-?\s*\$\s*[0-9.]", text):
        text = _DOLLAR.sub(r"\\$", text, count=1)  # $18 is money, $18$ is mathematics
    return _DOLLAR.sub(" ", text)


def _trimmed(tokens: list[Token]) -> list[Token]:
    """Without what a sentence puts around an answer: = or \\approx before it, a full stop or question mark after it."""
    first, last = 0, len(tokens)
    while first < last and tokens[first].text in ("=", r"\approx", ":"):
        first += 1
    while last > first and tokens[last - 1].text in (".", "?", ":", ";", ","):
        last -= 1
    tokens = tokens[first:last]
    while tokens and tokens[0].text == "{" and closing(tokens, 0) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


# One writing for arguments: \frac43 becomes \frac{4}{3}, \sqrt2 \sqrt{2}, x^2 x^{2}.


def _sequence(tokens: list[Token], at: int, depth: int, closed: bool) -> tuple[list[Token], int]:
    found: list[Token] = []
    applied = False  # the next operand is a function's argument
    while at < len(tokens):
        token = tokens[at]
        if closed and token.text == "}":
            return found, at + 1
        part, at = _piece(tokens, at, depth)
        # Braces that group nothing for a command show nothing: {41}42 is 4142 on paper.
        found += part[1:-1] if token.text == "{" and not applied else part
        applied = token.text in APPLIED or (applied and token.text in ("^", "_"))
    return found, at


def _piece(tokens: list[Token], at: int, depth: int) -> tuple[list[Token], int]:
    """One token together with the arguments that it takes."""
    if depth > MOST_DEPTH:
        raise Unreadable(f"nested more than {MOST_DEPTH} deep")
    token, at = tokens[at], at + 1
    if token.kind in ("word", "number", "letter"):
        return [token], at
    if token.text == "{":
        inner, at = _sequence(tokens, at, depth + 1, closed=True)
        return [token, *_over(inner), _CLOSE], at
    found = [token]
    if token.text == r"\sqrt" and at < len(tokens) and tokens[at].text == "[":
        end = closing(tokens, at) + 1
        found += tokens[at:end]
        at = end
    for _ in range(_ARGUMENTS.get(token.text, 0)):
        part, at = _argument_of(token.text, tokens, at, depth + 1)
        found += part
    return found, at


def _over(tokens: list[Token]) -> list[Token]:
    r"""{a \over b} as \frac{a}{b}."""
    parts, bars = split(tokens, (r"\over",))
    if len(bars) != 1:
        return tokens
    return [Token("command", r"\frac"), _OPEN, *parts[0], _CLOSE, _OPEN, *parts[1], _CLOSE]


_OPEN, _CLOSE = Token("punctuation", "{"), Token("punctuation", "}")
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, "^": 1, "_": 1} | dict.fromkeys(
    (r"\sqrt", r"\overline", r"\mathbb", r"\begin", r"\end"), 1
)


def _argument_of(command: str, tokens: list[Token], at: int, depth: int) -> tuple[list[Token], int]:
    token = tokens[at] if at < len(tokens) else _CLOSE
    if token.text in CLOSING:
        raise Unreadable(f"{command} without its argument")
    if token.text == "{":
        return _piece(tokens, at, depth)
    if command == r"\sqrt" and token.text == "(":  # sqrt(2), as plain text has it
        end = closing(tokens, at)
        inner, _ = _sequence(tokens[at + 1 : end], 0, depth, closed=False)
        return [_OPEN, *inner, _CLOSE], end + 1
    if command in (r"\frac", r"\binom") and token.kind == "number" and len(token.text) > 1:
        # TeX takes one digit. x^10 and \sqrt10 are read as people mean them.
        if not is_whole(token.text):
            raise Unreadable(f"{command} without braces")
        tokens[at] = replace(token, text=token.text[1:])
        return [_OPEN, replace(token, text=token.text[0]), _CLOSE], at
    if token.text in SIGNS and at + 1 < len(tokens):
        inner, at = _piece(tokens, at + 1, depth)
        return [_OPEN, token, *inner, _CLOSE], at
    inner, at = _piece(tokens, at, depth)
    return [_OPEN, *inner, _CLOSE], at


def closing(tokens: list[Token], at: int) -> int:
    """Index of the bracket that closes the one at `at`."""
    depth = 0
    for index in range(at, len(tokens)):
        if tokens[index].kind in ("word", "number"):
            continue
        if tokens[index].text in OPENING:
            depth += 1
        elif tokens[index].text in CLOSING:
            depth -= 1
            if depth == 0:
                return index
    raise Unreadable("a bracket that is never closed")


def split(tokens: list[Token], at_texts: Container[str]) -> tuple[list[list[Token]], list[str]]:
    """The parts between separators outside every bracket, and the separators."""
    parts: list[list[Token]] = [[]]
    separators: list[str] = []
    depth = 0
    for token in tokens:
        if token.kind in ("command", "punctuation"):
            if token.text in OPENING:
                depth += 1
            elif token.text in CLOSING:
                depth -= 1
            elif depth == 0 and token.text in at_texts:
                separators.append(token.text)
                parts.append([])
                continue
        parts[-1].append(token)
    return parts, separators
