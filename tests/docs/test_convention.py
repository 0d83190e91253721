"""The comments that steer the blocks of a page do what docs/contributing.md says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.docs.pages import Page, PageError, blocks_of

EVERYTHING = """
# A page

```python
import asyncio
from dataclasses import dataclass

@dataclass
class Point:
    x: int

point = Point(1)
```

The namespace is shared, `await` works, and the loop stays the same.

```python
await asyncio.sleep(0)
loop = asyncio.get_running_loop()
```

```python title="again.py"
assert asyncio.get_running_loop() is loop
await asyncio.sleep(0)
print("point", point, sep="\\n")
```

<!-- test: output -->

```text
point
Point(x=...)
```

<!-- test: file=pack/__init__.py -->
```python
VALUE = 41
```

<!-- test: file=pack/data.toml -->
```toml
[not python]
```

<!-- test: new -->
```python
from pack import VALUE
assert "point" not in globals()
```

<!-- test: raises=LookupError -->
```python
{}["missing"]
```

<!-- test: output -->
```
KeyError: 'missing'
```

```pycon
>>> VALUE + 1
42
>>> after = VALUE
```

<!-- test: skip needs a cluster -->
```python
raise SystemExit
```

<!-- test: needs=no_such_module -->
```python
import no_such_module
```

<!-- test: output -->
```
what it would print
```

<!-- test: needs=json -->
```python
print("there")
```

<!-- test: output -->
```
there
```

- an item

    ```python
    assert after == 41
    ```

<!-- test: run -->
```console
$ echo one \\
  two
one two
$ printf '1\\n2\\n3\\n'
1
...
3
```

<!-- test: run exit=3 -->
```bash
echo last
exit 3
```

<!-- test: output -->
```
last
```

```bash
exit 1  # not run
```

````markdown
```python
not python
```
````
"""


def run_page(tmp_path: Path, text: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(text, "utf-8")
    directory = tmp_path / "work"
    directory.mkdir()
    with Page(directory) as page:
        for block in blocks_of(path):
            page.run(block)


def test_a_page_with_everything(tmp_path: Path) -> None:
    path, modules, directory = list(sys.path), set(sys.modules), Path.cwd()
    run_page(tmp_path, EVERYTHING)
    assert sys.path == path
    assert Path.cwd() == directory
    assert not {"pack", "page_1", "page_2"} & (sys.modules.keys() - modules)


@pytest.mark.parametrize(
    "text, message",
    [
        ("```python\n1 +\n```", "invalid syntax"),
        ("<!-- test: skip why -->\n```python\n1 +\n```", "invalid syntax"),
        ("<!-- test: file=a.py -->\n```python\n1 +\n```", "invalid syntax"),
        ("```python\nprint(1)\n```\n<!-- test: output -->\n```\n2\n```", "expected:\n  2\n"),
        ("<!-- test: raises=KeyError -->\n```python\npass\n```", "did not raise KeyError"),
        ("```pycon\n>>> 1\n2\n```", "Expected:"),
        ("<!-- test: run -->\n```console\n$ false\n```", "exit status 1, not 0"),
        ("<!-- test: run -->\n```console\n$ echo 1\n2\n```", "got:\n  1\n"),
        ("<!-- test: runs -->\n```python\n```", "bad comment"),
        ("<!-- test: skip -->\n```python\n```", "bad comment"),
        ("<!-- test: new -->\ntext", "a block must follow"),
        ("```python\npass", "not closed"),
    ],
)
def test_a_failure_is_found(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((PageError, SyntaxError), match=re.escape(message)):
        run_page(tmp_path, text)


def test_a_failure_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(tmp_path, "# Title\n\n```python\nx = 0\n1 / x\n```\n")
    page = tmp_path / "page.md"
    assert caught.value.__notes__ == [f"in the block at {page}:4"]
    entry = caught.traceback[-1]
    assert (Path(entry.path), entry.lineno + 1) == (page, 5)
