r"""Answers that are made to hang, crash, fill memory, break out, or deceive; none of them equals its gold.

Each is a text in which `§` becomes a number of the caller's choice, so that no two answers are the same text and none
comes out of a cache, and `PORT` the port of a listener that must never hear from any. What a hostile expression would
do to files, it does below the current folder, the home folder or the folder of temporary files.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Hostile(NamedTuple):
    r"""One hostile answer.

    Attributes:
        text: stands in a \boxed{}, or is the whole completion where `whole` is set.
        gold: what it is graded against.
        whole: the text is a completion.
    """

    text: str
    gold: str = "42"
    whole: bool = False

    def completion(self, number: int, port: int = 9) -> str:
        """The completion whose § is `number`."""
        text = self.text.replace("§", str(number)).replace("PORT", str(port))
        return text if self.whole else rf"So the answer is \boxed{{{text}}}."


def nested(before: str, core: str, after: str, depth: int) -> str:
    return before * depth + core + after * depth


def _code(statement: str) -> Hostile:
    """Python in a box; its braces stay balanced, so that the box closes."""
    return Hostile(f"§+{statement}")


_RADICALS = "+".join(rf"\sqrt{{{n}+§}}" for n in range(2, 40))
_PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71]
_OVERRUNNING = nested(r"\ln(2+", "§", ")", 20)  # within every limit of length and depth, and not decided in time
_TOWER = r"(x+§)^{(x^{99}+9)^{9}}"

POWERS = {
    "tower of powers": Hostile("§^{9^{9^{9^{9}}}}"),
    "long tower": Hostile(nested("§^{", "9", "}", 500)),
    "tower within the nesting limit": Hostile(nested("§^{", "9", "}", 20)),
    "tower of python powers": Hostile("§**9**9**9"),
    "tower with carets": Hostile("§^9^9^9^9"),
    "negative tower": Hostile("§^{-9^{9^{9}}}"),
    "power of a fraction": Hostile(r"\left(\frac{1}{§}\right)^{9^{9^9}}"),
    "power of a radical": Hostile(r"(\sqrt{2}+\sqrt{§})^{4999}"),
    "power of an irrational tower": Hostile(r"\pi^{\pi^{\pi^{\pi^{§}}}}"),
    "tower modulo": Hostile(r"§^{9^{9^{9}}} \bmod 43"),
    "powers of powers of a number": Hostile("(((§^{999})^{999})^{999})^{999}"),
    "powers of powers of a sum": Hostile("((((x+§)^{9}+1)^{9}+1)^{9}+1)^{9}", "x"),
    "power of a sum": Hostile("(x+§)^{4999}", "x+1"),
    "power of many sums": Hostile("(a+b+c+d+e+f+g+h+§)^{400}", "a"),
    "product of powers of sums": Hostile("".join(f"(x+{n}+§)^{{99}}" for n in range(60)), "x+1"),
    "quotient of powers of sums": Hostile(r"\frac{(x+y+§)^{300}-(x-y)^{300}}{(x+y)^{299}+(x-y)^{298}}", "x+1"),
    "tower in an exponent": Hostile(_TOWER, "x"),
    "power with a radical exponent": Hostile(r"(x^{\sqrt{2}}+§)^{\sqrt{3}^{\sqrt{5}^{99}}}", "x"),
    "complex power": Hostile(r"(1+i)^{§999999999}"),
    "root of a tower": Hostile(r"\sqrt[§]{2^{9^{9^{9}}}}"),
    "huge root": Hostile(r"\sqrt[999999999]{§!+1}"),
}
COMBINATORICS = {
    "factorial": Hostile("§000000!"),
    "factorial within the limit": Hostile("4999!+§"),
    "factorial of a factorial": Hostile("(((§!)!)!)!"),
    "factorials in a row": Hostile("§!!!!!!!!!!!!"),
    "quotient of factorials": Hostile(r"\frac{§9999999!}{99999998!}"),
    "factorial of a symbol": Hostile(r"\frac{(x+§)!}{(x-4000)!}", "x"),
    "binomial": Hostile(r"\binom{§00000000}{50000000}"),
    "binomial within the limit": Hostile(r"\binom{4999}{2500}^{4999}+§"),
    "binomial of binomials": Hostile(nested(r"\binom{§}{", "9", "}", 20)),
    "binomial of a symbol": Hostile(r"\binom{x+§}{4000}", "x"),
    "gamma": Hostile(r"\Gamma(§^{99})"),
    "primorial of a large number": Hostile(r"\gcd(§^{9^9}, 9^{9^9})"),
}
NESTING = {
    "nested parentheses": Hostile(nested("(", "§", ")", 3_000)),
    "nested parentheses within a limit": Hostile(nested("(1+", "§", ")", 22)),
    "nested braces": Hostile(nested("{", "§", "}", 50_000)),
    "nested fractions": Hostile(nested(r"\frac{1}{1+", "§x", "}", 3_000), "x"),
    "continued fraction": Hostile(nested(r"\frac{1}{x+", "§y", "}", 22), "x"),
    "nested roots": Hostile(nested(r"\sqrt{1+", "§", "}", 3_000)),
    "nested roots within a limit": Hostile(nested(r"\sqrt{2+", r"\sqrt{§}", "}", 20), r"\sqrt{3}"),
    "nested roots of an unknown": Hostile(nested(r"\sqrt{x+", r"\sqrt{§}", "}", 20), r"\sqrt{x}"),
    "nested sines": Hostile(nested(r"\sin(", "§x", ")", 500), "x"),
    "nested sines within a limit": Hostile(nested(r"\sin(", "§x", ")", 20), r"\sin x"),
    "nested logarithms": Hostile(_OVERRUNNING, r"\ln 2"),
    "nested absolute values": Hostile(nested("|x-", "§", "|", 20), "x"),
    "nested left and right": Hostile(nested(r"\left(", "§", r"\right)", 2_000)),
    "nested boxes": Hostile(nested(r"\boxed{", "§", "}", 5_000)),
    "nested texts": Hostile(nested(r"\text{", "§", "}", 3_000)),
    "nested tuples": Hostile(nested("(1,", "§", ")", 1_000), "(1,2)"),
    "nested sets": Hostile(nested(r"\{1,", "§", r"\}", 1_000), r"\{1,2\}"),
    "nested matrices": Hostile(
        nested(r"\begin{pmatrix}1&", "§", r"\end{pmatrix}", 300), r"\begin{pmatrix}1&2\end{pmatrix}"
    ),
    "nested exponents of an unknown": Hostile(nested("x^{", "§", "}", 22), "x"),
    "minus signs": Hostile("-" * 9_999 + "§"),
    "minus signs within a limit": Hostile("-" * 900 + "§"),
    "plus signs": Hostile("§" + "+1" * 50_000),
    "opening parentheses": Hostile("§" + "(" * 100_000),
    "closing parentheses": Hostile("§" + ")" * 100_000),
    "opening brackets that half match": Hostile("([" * 20_000 + "§"),
    "absolute bars": Hostile("|" * 9_999 + "§" + "|" * 9_999),
}
SIZE = {
    "100,000 digits": Hostile("§" + "1" * 100_000),
    "100,000 decimals": Hostile("§." + "1" * 100_000),
    "5,000 digits": Hostile("§" + "7" * 5_000),
    "digits within a limit": Hostile("§" + "7" * 480 + r"\cdot" + "3" * 480),
    "huge exponent": Hostile("§e999999999"),
    "huge negative exponent": Hostile("§e-999999999"),
    "huge exponent behind zeros": Hostile("1e00000000§000000"),
    "huge decimal exponent": Hostile("§.0E+99999999999999999999"),
    "huge power of ten": Hostile(r"§\times10^{999999999}"),
    "huge negative power of ten": Hostile("42+10^{-§999999999}"),
    "huge period": Hostile(r"0.\overline{§" + "142857" * 5_000 + "}"),
    "period within a limit": Hostile(r"0.§\overline{" + "1" * 480 + "}"),
    "huge base": Hostile("1" * 900 + "_{§}", "1011_2"),
    "3,000 elements": Hostile(r"\{" + ",".join(f"§+{n}" for n in range(3_000)) + r"\}"),
    "3,000 elements, gold alike": Hostile(
        r"\{" + ",".join(f"§+{n}" for n in range(3_000)) + r"\}", r"\{" + ",".join(map(str, range(60))) + r"\}"
    ),
    "60 radicals against 60": Hostile(
        ",".join(rf"\sqrt{{{n}+§}}" for n in range(60)), ",".join(rf"\sqrt{{{n}}}+1" for n in range(60))
    ),
    "20 unknowns against 20": Hostile(
        ",".join(f"(x+§)^{{{n}}}" for n in range(2, 22)), ",".join(f"(x+1)^{{{n}}}" for n in range(2, 22))
    ),
    "giant matrix": Hostile(
        r"\begin{pmatrix}" + r"\\".join(["&".join(["§"] * 300)] * 300) + r"\end{pmatrix}",
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    ),
    "determinant": Hostile(
        r"\begin{vmatrix}"
        + r"\\".join("&".join(f"a_{{{i}{j}}}" for j in range(9)) for i in range(9))
        + r"\end{vmatrix}+§",
        "a",
    ),
    "sum of 38 radicals": Hostile(_RADICALS, r"\sqrt{2}"),
    "radicals that nearly cancel": Hostile(
        "+".join(rf"\sqrt{{{p}}}" for p in _PRIMES) + "-" + "-".join(rf"\sqrt{{{p + 10}+§}}" for p in _PRIMES), "0"
    ),
    "product of 40 conjugates": Hostile("".join(rf"(x-\sqrt{{{p}}}+\sqrt{{{p + 1}+§}})" for p in _PRIMES), "x"),
    "20,000 factors": Hostile(r"\cdot ".join(["§"] * 20_000)),
    "20,000 symbols": Hostile("+".join(f"x_{{{n}}}" for n in range(20_000)) + "+§", "x"),
    "90 symbols": Hostile("(" + "+".join(f"x_{{{n}}}" for n in range(90)) + "+§)^{9}", "x"),
    "a megabyte of prose": Hostile("Hmm § " * 150_000 + r"\boxed{§}", whole=True),
    "10,000 boxes": Hostile("Hmm " * 200_000 + "".join(rf"\boxed{{§+{n}}}" for n in range(10_000)), whole=True),
    "10,000 unclosed boxes": Hostile(r"\boxed{§ " * 10_000, whole=True),
    "10,000 boxes in boxes": Hostile(nested(r"\boxed{§", "1", "}", 10_000), whole=True),
    "10,000 answer tags": Hostile(r"<answer>§</answer>" * 10_000 + r"\boxed{§}", whole=True),
    "100,000 opened reasonings": Hostile("<think>" * 100_000 + r"\boxed{§}", whole=True),
    "100,000 closed reasonings": Hostile("</think>" * 100_000 + r"\boxed{§}", whole=True),
    "60 boxes that each take their time": Hostile(
        "".join(rf"\boxed{{(x+§+{n})^{{4999}}}}" for n in range(60)), "x+1", whole=True
    ),
    "63 boxes that overrun, and the gold": Hostile(
        "".join(rf"\boxed{{{_OVERRUNNING}+{n}}}" for n in range(63)) + r"\boxed{42}", whole=True
    ),
    "the gold, and 63 boxes that overrun": Hostile(
        r"\boxed{42}" + "".join(rf"\boxed{{{_OVERRUNNING}+{n}}}" for n in range(63)), whole=True
    ),
    "60 boxes of radicals": Hostile("".join(rf"\boxed{{{_RADICALS}+{n}}}" for n in range(60)), r"\sqrt{2}", whole=True),
}
CALCULUS = {
    "sum": Hostile(r"\sum_{k=1}^{§000000000}\frac{1}{k^3}"),
    "sum of factorials": Hostile(r"\sum_{k=0}^{99999}k!+§"),
    "infinite sum": Hostile(r"\sum_{k=1}^{\infty}\frac{\sin(k^2)}{k^§}"),
    "diverging sum": Hostile(r"\sum_{k=1}^{\infty}k^{§}"),
    "sums in sums": Hostile(r"\sum_{a=1}^{9999}\sum_{b=1}^{9999}\sum_{c=1}^{9999}\frac{1}{a+b+c+§}"),
    "product": Hostile(r"\prod_{k=1}^{§0000000}k"),
    "integral": Hostile(r"\int_0^{§}e^{-x^2}\sin(x^3)\cos(e^x)\,dx"),
    "integrals in integrals": Hostile(r"\int_0^1\int_0^1\int_0^1\sin(xyz)^{xyz+§}\,dx\,dy\,dz"),
    "limit": Hostile(r"\lim_{x\to\infty}\left(1+\frac{§}{x}\right)^{x^{x^{x}}}"),
    "limit of wild functions": Hostile(r"\lim_{x\to0}\frac{\sin(\tan x)-\tan(\sin x)}{x^{§}}"),
    "derivative": Hostile(r"\frac{d^{99}}{dx^{99}}\sin(e^{\cos(x^{§})})", "x"),
    "sine of a large number": Hostile(r"\sin(§^{4999})"),
    "cosine of a tower": Hostile(r"\cos(10^{10^{10^{§}}})"),
    "tangents": Hostile("+".join(rf"\tan({n}x+§)" for n in range(1, 60)), r"\tan x"),
    "trigonometry that does not simplify": Hostile(r"\sin^{99}(§x)\cos^{99}(17x)\tan^{99}(13x)-\sin(x)", r"\sin x"),
    "logarithm of a tower": Hostile(r"\log_{2}(§^{9^{9^{9}}})"),
    "floor of a tower": Hostile(r"\lfloor \pi^{9^{9^{§}}} \rfloor"),
    "zero that is hard to see": Hostile(r"\sqrt{§+2\sqrt{6}+2\sqrt{10}+2\sqrt{15}}-\sqrt{2}-\sqrt{3}-\sqrt{5}", "0"),
    "exponentials that nearly cancel": Hostile(r"e^{\pi\sqrt{163}}-262537412640768744+10^{-§}", "0"),
    "equation of high degree": Hostile("x^{999}+x^{998}y+§y^{997}=1", "x^2+y^2=1"),
    "equation of powers": Hostile("(x+y+§)^{999}=(x-y)^{998}", "x^2+y^2=1"),
    "interval of towers": Hostile("(-9^{9^{9^{9}}},§^{9^{9^{9}}}]", r"(-\infty,3]"),
    "tuple of hard numbers": Hostile(r"(4999!,\binom{4999}{2499},(\sqrt{2}+§)^{4999})", "(1,2,3)"),
}
REPEATS = {
    "spaces": Hostile("§" + " " * 200_000 + "1"),
    "spaces before a line's end": Hostile((" " * 50_000 + "\n") * 4 + "§"),
    "commas": Hostile("§" + "," * 100_000),
    "thousands": Hostile("§" + ",111" * 30_000),
    "thousands, broken": Hostile("§" + ",111" * 200 + "1"),
    "thin spaces": Hostile("§" + r"\,111" * 20_000),
    "backslashes": Hostile("§" + "\\" * 100_000),
    "backslashes and spaces": Hostile("§" + "\\ " * 50_000),
    "braces": Hostile("§" + "{}" * 50_000),
    "opening braces": Hostile("§" + "{" * 100_000, whole=True),
    "unclosed box and braces": Hostile(r"\boxed{§" + "{" * 100_000, whole=True),
    "percent signs": Hostile("§" + r"\%" * 50_000),
    "dollar signs": Hostile("$" * 99_999 + "§"),
    "carets": Hostile("§" + "^" * 50_000),
    "underscores": Hostile("§" + "_1" * 50_000),
    "primes": Hostile("x" + "'" * 50_000 + "§"),
    "degrees": Hostile("§" + r"^\circ" * 20_000),
    "equals": Hostile("x=" * 50_000 + "§"),
    "points": Hostile("§" + "." * 100_000),
    "digits and points": Hostile("§" + "1.1" * 30_000),
    "exponents": Hostile("§" + "e1" * 30_000),
    "letters": Hostile("a" * 100_000 + "§"),
    "words": Hostile(r"\text{ or }".join(["§"] * 10_000)),
    "units": Hostile("§" + r"\text{ cm}" * 20_000),
    "fractions without arguments": Hostile("§" + r"\frac" * 20_000),
    "roots without arguments": Hostile("§" + r"\sqrt" * 20_000),
    "left without right": Hostile("§" + r"\left(" * 20_000),
    "begin without end": Hostile("§" + r"\begin{pmatrix}" * 10_000),
    "operators": Hostile(r"\operatorname{" + "a" * 50_000 + "}(§)"),
    "plus or minus": Hostile("§" + r"\pm1" * 60, "1,2"),
    "plus or minus of unknowns": Hostile(r"\pm x" * 30 + "+§", r"\pm x"),
    "unions": Hostile(r"\cup".join(f"({n},{n}+§)" for n in range(5_000)), "(1,2)"),
    "unions within a limit": Hostile(r"\cup".join(f"({2 * n},§)" for n in range(60)), r"(1,2)\cup(3,4)"),
    "answer tags unclosed": Hostile("<answer>§" * 50_000, whole=True),
    "tag prefixes": Hostile("</reaso" * 100_000 + r"\boxed{§}", whole=True),
}
CHARACTERS = {
    "null bytes": Hostile("§\x00" * 100),
    "lone surrogate": Hostile("§\ud800"),
    "pair of lone surrogates": Hostile("\udc80§\udfff\ud800"),
    "text that grows when it is normalized": Hostile("§" + "ﷺ" * 20_000),
    "a short text that grows when it is normalized": Hostile("§" + "ﷺ" * 900),
    "combining marks": Hostile("§" + "\u0301" * 100_000),
    "marks of direction": Hostile("\u202e24§" + "\u200f" * 1_000),
    "zero-width spaces": Hostile("§" + "\u200b" * 50_000 + "2"),
    "emoji": Hostile("👩‍👩‍👧‍👦" * 10_000 + "§"),
    "all control characters": Hostile("§" + "".join(map(chr, range(32)))),
    "line separators": Hostile("§\u2028\u2029\x85\x0b\x0c" * 1_000),
    "a million of one letter": Hostile("\U0001d7d2" * 100_000 + "§"),
    "superscripts": Hostile("§" + "⁹" * 900),
    "vulgar fractions": Hostile("§" + "½" * 900),
    "dotless and sharp letters": Hostile(r"\text{" + "ßİı" * 300 + "§}", r"\text{east}"),
    "pickle of an object": Hostile("§ cos\nsystem\n(S'touch pwned'\ntR."),
    "line of a worker's own speech": Hostile('§\n[0, "returned", "correct", 0.0]\n'),
    "answer of a worker": Hostile('§"}\n{"value": "correct", "ended": "returned"}\n'),
}
INJECTIONS = {
    "os.system": _code("__import__('os').system('touch pwned')"),
    "os.system in the home folder": _code("__import__('os').system('touch ~/pwned')"),
    "a process that stays": _code("__import__('os').system('sleep 600 &')"),
    "fork": _code("__import__('os').fork()"),
    "kill the parent": _code("__import__('os').kill(__import__('os').getppid(),9)"),
    "exit": _code("__import__('os')._exit(0)"),
    "SystemExit": _code("exit(0)"),
    "subprocess": _code("__import__('subprocess').Popen(['sleep','600'])"),
    "open a file": _code("open('pwned','w').write('x')"),
    "open a temporary file": _code("__import__('tempfile').mkstemp('pwned')"),
    "pathlib": _code("__import__('pathlib').Path('pwned').touch()"),
    "socket": _code("__import__('socket').create_connection(('127.0.0.1',PORT))"),
    "fetch": _code("__import__('urllib.request').request.urlopen('http://127.0.0.1:PORT/')"),
    "exec": _code("exec('open(\\'pwned\\',\\'w\\')')"),
    "eval": _code('eval(\'__import__("os").system("touch pwned")\')'),
    "lambda": _code("(lambda: open('pwned','w'))()"),
    "an endless loop": _code("[x for x in iter(int,1)]"),
    "a comprehension that opens": _code("[open('pwned','w') for _ in (1,)]"),
    "attribute chain": _code("().__class__.__bases__[0].__subclasses__()"),
    "attribute chain that calls": _code(
        "[c for c in ().__class__.__base__.__subclasses__() if c.__name__=='Popen'][0](['touch','pwned'])"
    ),
    "f-string": Hostile('f\'§{{open("pwned","w")}}\''),
    "format string": Hostile("§{0.__class__.__init__.__globals__}".replace("{", "{{").replace("}", "}}")),
    "sympify": _code('sympify(\'open("pwned","w")\')'),
    "parse_expr": _code('parse_expr(\'open("pwned","w")\')'),
    "lambdify": _code('lambdify([],\'open("pwned","w")\')()'),
    "sympy preview": _code("preview(1,viewer='file',filename='pwned')"),
    "operatorname": Hostile(r"§+\operatorname{__import__}('os').\operatorname{system}('touch pwned')"),
    "mathrm": Hostile(r"§+\mathrm{exec}(\text{open('pwned','w')})"),
    "text": Hostile(r"\text{__import__('os').system('touch pwned§')}", r"\text{east}"),
    "symbol that is code": Hostile(r"x_{__import__('os').system('touch pwned§')}", "x"),
    "function that is code": Hostile(r"eval(§,open('pwned','w'))", "x"),
    "breakpoint": _code("breakpoint()"),
    "input": _code("input()"),
    "print": _code("print('correct')"),
    "import": Hostile("import os; os.system('touch pwned§')"),
    "TeX write": Hostile(r"\immediate\write18{touch pwned§}"),
    "TeX openout": Hostile(r"\newwrite\f\openout\f=pwned§"),
    "TeX input": Hostile(r"\input{/etc/passwd}§"),
    "TeX loop": Hostile(r"\def\x{\x\x}\x§"),
    "TeX loop of loops": Hostile(r"\loop\iftrue\repeat§"),
    "shell": Hostile("§$(touch pwned)`touch pwned`;touch pwned"),
    "always equal": Hostile("type('X',(),{'__eq__':lambda *a:True})()§"),
    "the verdict itself": Hostile("Verdict.CORRECT § correct"),
    "the gold itself": Hostile("gold if § else gold"),
}

HOSTILE: Mapping[str, Hostile] = {
    **POWERS,
    **COMBINATORICS,
    **NESTING,
    **SIZE,
    **CALCULUS,
    **REPEATS,
    **CHARACTERS,
    **INJECTIONS,
}
