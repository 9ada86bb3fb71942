from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest

from upright.errors import UprightError
from upright.recipes import Recorded, build, load_class, recipe


class Pair:
    def __init__(self, first: object = None, second: object = None) -> None:
        self.first, self.second = first, second


def test_a_recipe_can_be_built_again() -> None:
    inner = partial(Pair, second=[1, 2.5, "x", None, True])
    data = recipe(partial(Pair, first=inner, second={"a": (1, 2), "b": Pair}))
    name = f"{__name__}.Pair"
    assert data == {
        "class_path": name,
        "init_args": {
            "first": {"class_path": name, "init_args": {"second": [1, 2.5, "x", None, True]}},
            "second": {"a": (1, 2), "b": {"class_path": name}},
        },
    }
    rebuilt = build(data)()
    assert rebuilt.first().second == [1, 2.5, "x", None, True]
    assert rebuilt.second["a"] == (1, 2) and isinstance(rebuilt.second["b"](), Pair)
    assert recipe(build(data)) == data | {
        "init_args": data["init_args"] | {"second": {"a": (1, 2), "b": {"class_path": name, "init_args": {}}}}
    }


def test_paths_become_strings() -> None:
    assert recipe(Path("a/b")) == "a/b"


class Outer:
    class Inner:
        pass


@pytest.mark.parametrize(
    "part",
    [lambda: 1, Pair(), partial(print, 1), open, Outer.Inner, partial(Pair, Outer)],
    ids=["lambda", "object", "call", "function", "nested", "positional"],
)
def test_callables_that_cannot_be_rebuilt_are_refused(part: object) -> None:
    with pytest.raises(UprightError, match=r"cannot be written into a checkpoint.*functools\.partial"):
        recipe(part)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("collections.OrderdDict", "module 'collections' has no class 'OrderdDict'. Did you mean 'OrderedDict'?"),
        ("no.such.Thing", "cannot import module 'no.such'"),
        ("Thing", "cannot import module ''"),
        ("os.path.join", "has no class 'join'"),
    ],
)
def test_classes_that_do_not_exist(path: str, message: str) -> None:
    with pytest.raises(UprightError, match=message):
        load_class(path)
    assert load_class("collections.OrderedDict") is OrderedDict


def test_positional_and_keyword_arguments_are_recorded_by_name() -> None:
    class Base(Recorded):
        def __init__(self, *, low: int = 1) -> None:
            self.low = low

    class Own(Base):
        def __init__(self, high: int, middle: int = 2, **options: int) -> None:
            super().__init__(**options)

    assert Own(3, low=4).arguments == {"high": 3, "low": 4}
    assert Own(3, 5).arguments == {"high": 3, "middle": 5}
