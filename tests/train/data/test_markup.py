"""HTML, info pages and texts without what is not for reading."""

import pytest

from hotlap.train.data.markup import html_text, info_text, plain_text


def test_of_html_what_is_seen_stays():
    page = (
        "<html><head><title>T</title><style>p {}</style></head><body><nav><ul><li>Home</ul></nav>"
        "<h1>Files &amp; folders<a href='#f'>&para;</a></h1>\n<p>A  file\nhas <b>a</b> name.<br>"
        "And&nbsp;more.<script>run()</script>"
        "<pre>a\n  b</pre><ul><li>one</li>\n<li>two</li></ul></body></html>"
    )
    assert html_text(page).split("\n\n") == [
        "Files & folders", "A file has a name.\nAnd more.", "a\n  b", "one", "two\n",
    ]  # fmt: skip


def test_html_that_is_not_closed_is_read_to_its_end():
    assert html_text("</nav></pre><p>one<p>two<div <b>three") == "one\n\ntwo<div three\n"
    assert html_text("<head><title>x</title><body>a < b<![if x]>, <!--c") == "a < b,\n"
    assert html_text("<nav>menu") == "\n"


@pytest.mark.parametrize(
    "piece", ["<![CDATA[", "<a ", "<!--", "</p ", "<", "&#", " ", "\n ", "* ", "\x1b[", "=-", "File: "]
)
@pytest.mark.parametrize("text_of", [html_text, info_text, plain_text])
def test_any_text_is_read_in_time_by_its_length(text_of, piece):
    assert isinstance(text_of(piece * 100_000), str)


def test_info_pages_lose_their_menus_and_tables():
    page = (
        "This is x.info.\n\n\x1f\nFile: x.info,  Node: Top,  Next: Use,  Up: (dir)\n\nX\n*\n\nX does it.\n\n"
        "* Menu:\n\n* Use::   How.\n\n\x1f\nFile: x.info,  Node: Use,  Up: Top\n\nRun it.\n\n"
        "\x1f\nTag Table:\nNode: Top\x7f50\n\x1f"
    )
    assert "".join(info_text(page).split()) == "Thisisx.info.X*Xdoesit.Runit."


def test_rulers_directives_badges_and_colours_are_left_out_of_texts():
    text = (
        "Title\r\n=====\r\n\r\n.. index:: a\n:date: today\n\n[![Build](x)](y)\n<!-- no\nmore -->A "
        "\x1b[1mbold\x1b[0m b\x08bit.\n---\n"
    )
    assert plain_text(text).split() == ["Title", "A", "bold", "bit.", "---"]
