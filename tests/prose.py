"""The prose check of `make lint`: plain English in comments, docstrings, messages and docs.

Run it as ``python -m tests.prose [PATH ...]``. Each rule is a pattern that our readers stumbled over, with a hint. The
check knows words, not meaning: a sentence that passes can still be hard to read. CONTRIBUTING.md has the full rule.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("memstate_sa", "alembic", "benchmarks", "docs", "examples", "tests", ".github")
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "pyproject.toml")
CODE = re.compile(  # SQL, and the Lua of Redis
    r"\A\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|WITH|DO|BEGIN|IF|PERFORM)\b"
    r"|\b(RAISE EXCEPTION|DECLARE|END IF|END;|redis\.call)"
)
LONGEST_SENTENCE = 25  # words: the rule for writers is 20, and the check leaves room for lists and names

# A "what" clause after these verbs is everyday English: "the message says what is missing".
TELLING = re.findall(r"\w+", "say says said show shows see know knows tell tells ask asks decide decides matter")


# A comment of more than a few words that begins like this is a part of a sentence.
FRAGMENT = re.compile(
    r"^(by|before|after|without|with|in|of|for|to|so that|not|only|also|unless|again|outside|avoids|runs|does|raises"
    r"|reads|takes|changes|computed|called|kept)\b(?!,)",
    re.IGNORECASE,
)
ADVERBIAL = re.compile(r"^(With|Without|After|Before|In|For|To|By|Only|Outside) [^,:]+, \w|^To \w+|^(Only|Not|Also) ")


def words(*choices: str) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(choices)})\b", re.IGNORECASE)


RULES = {
    "start": (
        re.compile(r"^(What|Who|Whoever|Whatever|Whichever|Whose|Those|So many|Of|As what|Where|Lest)\b(?!.*\?$)"),
        "begin with the subject, and name it",
    ),
    "what": (
        re.compile(
            rf"(?<!\A){''.join(f'(?<!{verb} )' for verb in TELLING)}\bwhat(?:ever)?\b(?! to do\b)(?!.*\?)",
            re.IGNORECASE,
        ),
        "a noun is missing where a 'what' clause stands for one: see docs/glossary.md",
    ),
    "archaic": (
        words(
            *(
                "lest",
                "anew",
                "nobody",
                "meanwhile",
                "thereby",
                "whereby",
                "wherein",
                "therein",
                "thereof",
                "thereupon",
            ),
            *(
                "thereafter",
                "whence",
                "thence",
                "whilst",
                "henceforth",
                "hereby",
                "herein",
                "notwithstanding",
                "insofar",
            ),
            *("inasmuch", "so many"),
        ),
        "use an everyday word",
    ),
    "pronoun": (
        words(
            *("that which", "those which", "those that", "those who", "one that", "ones that", "of which", "of whose"),
            *("whom", "by which", "in which case", "the former", "the latter"),
        ),
        "name the thing again instead of pointing at it",
    ),
    "is to": (words(r"(?:is|are|was|were) to (?!the\b|a\b|an\b)[a-z]+"), "use must, will or can"),
    "inverted": (
        words(
            *("nor (?:is|are|do|does|did|has|have|can)", "neither (?:is|are|do|does|has|have)", "not so", "but for"),
            *("and so (?:is|are|do|does|has|have)", "save for", "all the same", "none the less", "be it", "for good"),
            *("as it (?:were|comes)", "in its stead"),
        ),
        "subject, verb, object",
    ),
    "unclear": (
        words(r"tells? (?:its|them|their)\b(?!.*\bapart)", "inside of", "surely", "does and no"),
        "say it in other words",
    ),
    "semicolons": (re.compile(r";.*;"), "one idea a sentence"),
    "long": (
        re.compile(rf"^(?:\S+\s+){{{LONGEST_SENTENCE},}}\S+$"),
        f"more than {LONGEST_SENTENCE} words: split it",
    ),
}


@dataclass(frozen=True)
class Prose:
    """A piece of running text, and the line where it begins."""

    line: int
    text: str
    is_comment: bool = False


def python_prose(source: str, *, messages: bool) -> Iterator[Prose]:
    """The comments and docstrings of *source*, and with *messages* its other strings that read as sentences."""
    yield from _comments(source)
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            docstrings.add(id(statement.value))
            yield from _paragraphs(ast.get_docstring(node) or "", statement.lineno)
    if not messages:
        return
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in node.values)
            text = "".join(
                part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "x"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inside:
            text = node.value
        else:
            continue
        if len(text.split()) >= 4 and not CODE.search(text):
            yield Prose(node.lineno, text)


def _comments(source: str) -> Iterator[Prose]:
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.string.startswith(("#!", "# noqa", "# type:", "# ---")):
            continue
        line, alone = token.start[0], not token.line[: token.start[1]].strip()
        text = re.sub(r"#\s*(noqa|type: ignore)\S*", "", token.string.lstrip("#")).strip()
        if block and alone and line == last + 1:
            block.append(text)
        else:
            if block:
                yield Prose(start, " ".join(block), is_comment=True)
            block, start = [text], line
        last = line if alone else -1
    if block:
        yield Prose(start, " ".join(block), is_comment=True)


def markdown_prose(text: str) -> Iterator[Prose]:
    """The paragraphs, list items and table cells of a page, without its code blocks."""
    text = re.sub(
        r"^(`{3,}).*?^\1\s*$", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    )
    yield from _paragraphs(text, 1)


def _paragraphs(text: str, first_line: int) -> Iterator[Prose]:
    block: list[str] = []
    start = first_line
    for number, line in enumerate([*text.splitlines(), ""], first_line):
        stripped = line.strip()
        begins = re.match(r"([-*+]|\d+\.|#+|\|)\s", stripped)
        if block and (not stripped or begins):
            yield Prose(start, " ".join(block))
            block = []
        if not stripped or stripped.startswith((">>>", "...", "```", "!")):
            continue
        if stripped.startswith("|"):
            yield from (Prose(number, cell.strip()) for cell in stripped.strip("|").split("|"))
            continue
        if not block:
            start = number
        block.append(re.sub(r"^([-*+]|\d+\.|#+)\s+", "", stripped))


def sentences(text: str) -> Iterator[str]:
    """The sentences of *text*; code, quotations and link targets count as one word each."""
    text = re.sub(r"``.*?``|`[^`]*`", "CODE", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r'[“"][^”"]*[”"]', "QUOTE", text)
    text = re.sub(r"\s+", " ", text).strip()
    for sentence in re.split(r"(?<=[.!?:])[*_)]*\s+(?=[A-Z*_(\[])|\n\n", text):
        yield sentence.strip("*_ ")


def hits(prose: Prose) -> Iterator[tuple[str, str]]:
    """The broken rule and the sentence, for each sentence that breaks one."""
    for sentence in sentences(prose.text):
        if (
            prose.is_comment
            and len(sentence.split()) > 5
            and FRAGMENT.search(sentence)
            and not ADVERBIAL.search(sentence)
        ):
            yield "fragment", sentence
        for rule, (pattern, _) in RULES.items():
            if pattern.search(sentence) and not any(excuse in sentence for excuse in EXCUSED.get(rule, ())):
                yield rule, sentence


# Sentences that are right as they are, by rule: each is a part of one sentence.
EXCUSED: dict[str, tuple[str, ...]] = {}


def prose_of(path: Path) -> Iterator[Prose]:
    text = path.read_text()
    if path.suffix == ".py":
        yield from python_prose(text, messages=path.resolve().is_relative_to(ROOT / "memstate_sa"))
    elif path.suffix == ".md":
        yield from markdown_prose(text)
    else:
        yield from (
            Prose(n, line.lstrip("# ")) for n, line in enumerate(text.splitlines(), 1) if re.match(r"\s*#", line)
        )


def files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix in {".py", ".md"} and file.is_file())
        elif path.is_file():
            yield path


def main() -> None:
    parser = argparse.ArgumentParser(description="Plain English in comments, docstrings, messages and docs.")
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders (default: the whole project)")
    parser.add_argument(
        "--count", action="store_true", help="the number of hits by rule and by folder, and no sentences"
    )
    options = parser.parse_args()
    by_rule: Counter[str] = Counter()
    by_folder: Counter[str] = Counter()
    for path in files(options.paths or [ROOT / name for name in (*FOLDERS, *FILES)]):
        for prose in prose_of(path):
            for rule, sentence in hits(prose):
                by_rule[rule] += 1
                by_folder["/".join(path.resolve().relative_to(ROOT).parts[:2])] += 1
                if not options.count:
                    hint = RULES[rule][1] if rule in RULES else "write a whole sentence, with a subject and a verb"
                    print(f"{path}:{prose.line}: {rule}: {hint}: {sentence}")
    for counter in (by_rule, by_folder) if options.count else ():
        print(*(f"{number:6} {name}" for name, number in counter.most_common()), sep="\n", end="\n\n")
    if total := by_rule.total():
        sys.exit(f"{total} sentences are not plain English: see CONTRIBUTING.md")


if __name__ == "__main__":
    main()
