"""CUDA C++ to C++ for g++: what neither macros nor headers can stand in for.

Launches and shared variables are rewritten, and two names: ``__CUDA_ARCH__``, which torch's headers must not see, and
``at::empty``, whose memory shall be full of NaN. Line numbers stay.
"""

import re

SKIPPED = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
NAMES = {r"\b__CUDA_ARCH__\b": "SIMULATED_ARCH", r"\bat::empty\(": "::simulated::empty("}
SHARED = re.compile(
    r"(extern\s+)?__shared__\s+((?:alignas|__align__)\s*\(([^()]*)\)\s*)?([^;=]*?)\b(\w+)\s*((?:\[[^;]*\])?)\s*;"
)


def without_comments(source: str) -> str:
    """Comments become blanks of the same lines; strings stay."""

    def blank(match: re.Match) -> str:
        text = match.group()
        return re.sub(r"[^\n]", " ", text) if text.startswith("/") else text

    return SKIPPED.sub(blank, source)


def kernel_begins(source: str, end: int) -> int:
    """Where the expression ``name<arguments>`` that ends at ``end`` begins."""
    begin = len(source[:end].rstrip())
    depth = 0
    if source[begin - 1] == ">":
        while True:
            begin -= 1
            if source[begin] == ">" and source[begin - 1] != "-":
                depth += 1
            elif source[begin] == "<":
                depth -= 1
            if depth == 0:
                break
    return re.search(r"(?:\w|::)+\s*$", source[:begin]).start()


def translate_launches(source: str) -> str:
    """``kernel<T><<<grid, block>>>(arguments)`` becomes ``launcher(kernel<T>, name, line, grid, block)(arguments)``."""
    while (opening := source.find("<<<")) >= 0:
        closing = source.find(">>>", opening)
        if closing < 0:
            raise ValueError("a launch without >>>")
        begin = kernel_begins(source, opening)
        kernel = source[begin:opening]
        name = re.match(r"[\w:]+", kernel).group()
        configuration = source[opening + 3 : closing]
        launcher = f'::simulated::launcher({kernel.rstrip()}, "{name}", __LINE__, {configuration})'
        newlines = "\n" * (kernel.count("\n") - kernel.rstrip().count("\n"))
        source = source[:begin] + launcher + newlines + source[closing + 3 :]
    return source


def translate_shared(source: str) -> str:
    """Shared variables become references to the simulator's memory."""

    def replace(match: re.Match) -> str:
        dynamic, aligned, alignment, kind, name, dimensions = match.groups()
        kind = kind.strip()
        if "," in re.sub(r"<[^;]*>|\[[^;]*\]|\([^;]*\)", "", kind):
            raise ValueError(f"several variables in one declaration, declare each alone: {match.group()}")
        least = f"{alignment}" if aligned else f"alignof({kind})"
        if dynamic:
            return f"{kind}* {name} = static_cast<{kind}*>(::simulated::dynamic_shared({least}));"
        memory = f"::simulated::shared_variable(__COUNTER__, sizeof({name}_in_memory), {least})"
        return (
            f"typedef {kind} {name}_in_memory{dimensions}; "
            f"{name}_in_memory& {name} = *static_cast<{name}_in_memory*>({memory});"
        )

    translated = SHARED.sub(replace, source)
    if "__shared__" in translated:
        line = translated[: translated.index("__shared__")].count("\n") + 1
        raise ValueError(f"a shared variable that is not understood in line {line}")
    return translated


def translate(source: str, path: str) -> str:
    """The translation of a .cu file or header; ``path`` is its name in messages."""
    source = translate_shared(translate_launches(without_comments(source)))
    for pattern, replacement in NAMES.items():
        source = re.sub(pattern, replacement, source)
    return f'#line 1 "{path}"\n{source}'
