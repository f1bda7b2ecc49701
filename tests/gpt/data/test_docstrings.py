import pytest

from molegrad.gpt.data.docstrings import clean, extract_file, extract_source

SOURCE = '''
"""The module's own docstring."""
import torch

def outer(a: int, *args, b=2, **kw) -> int:
    """Outer does something useful."""
    def inner(x):
        """Inner also does something."""

class Shape(Base, metaclass=Meta):
    """A shape with\tcorners.


    And two blank lines before this.
    """
    @property
    def area(self):
        """The area of the shape, in squares."""
    def short(self):
        """Too short."""

try:
    import fast
except ImportError:
    async def slow():
        """Only defined in a handler of try."""
else:
    def quick():
        """Only defined where the import worked."""

add_docstr(torch.abs, r"""
abs(input) -> Tensor

Computes {{x}} of :attr:`input` at {place}.

Args:
    {input}
""" + r"""Example: none.""".format(**common))
fft = _add_docstr(_fft.fft, "The one-dimensional transform.")
add_docstr_all("neg_", "neg_() -> Tensor, in place.")
add_newdoc("numpy.core", "ndarray", ("T", "The transposed array, a view."))
add_newdoc("numpy.core", "flatiter", [("base", "A reference to the iterated array.")])
outer.__doc__ = "Assigned afterwards to outer."
add_docstr(torch.skip, UNKNOWN)
'''


def test_finds_every_kind_of_docstring():
    records = {name: (kind, head, doc) for _, name, kind, head, doc in extract_source(SOURCE, "m")}
    assert set(records) == {
        "m",
        "m.outer",
        "m.outer.inner",
        "m.Shape",
        "m.Shape.area",
        "m.quick",
        "m.slow",
        "torch.abs",
        "m.fft",
        "torch.Tensor.neg_",
        "numpy.core.ndarray.T",
        "numpy.core.flatiter.base",
    }
    assert records["m"] == ("module", "module m", "The module's own docstring.")
    assert records["m.Shape"][:2] == ("class", "class m.Shape(Base)")
    assert records["m.Shape"][2].count("\n\n") == 1 and "\t" not in records["m.Shape"][2]
    assert records["m.outer.inner"][2] == "Inner also does something."
    assert records["m.slow"][2].startswith("Only defined in a handler")
    assert records["torch.Tensor.neg_"][0] == "function"
    assert records["numpy.core.ndarray.T"][2] == "The transposed array, a view."
    assert "m.Shape.short" not in records and "torch.skip" not in records


def test_definition_line_has_defaults_and_no_annotations():
    heads = [record[3] for record in extract_source(SOURCE, "m")]
    assert "def m.outer(a, *args, b=2, **kw)" in heads


def test_placeholders_of_format():
    source = 'add_docstr(t.f, """Takes {name} as {{set}}.\n\nArgs:\n    {input}\n""".format(**c))'
    (record,) = extract_source(source, "m")
    assert record[4] == "Takes name as {set}.\n\nArgs:"


def test_clean():
    assert clean("a  \r\n\n\n\n    b\x00\x07\n    c\ud800\n") == "a\n\nb\nc"


def test_unreadable_files_give_nothing(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def (:\n")
    assert extract_file(str(bad), "bad") == []
    assert extract_file(str(tmp_path / "none.py"), "none") == []
    with pytest.raises(SyntaxError):
        extract_source("def (:\n", "bad")
