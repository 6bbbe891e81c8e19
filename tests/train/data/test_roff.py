"""Manual pages without the macros."""

import pytest

from hotlap.train.data.roff import manual_text

MAN = r"""'\" t
.\" A comment
.de Vb
.ft CW
..
.ie \n(.g .ds Aq \(aq
.el       .ds Aq '
.if \n(.V==1 \{\
.tm hidden
.\}
.TH COPY 1 "May 2026" "shell 1.0" "User Commands"
.SH NAME
copy \- copy \fBfiles\fR
.SH "EXIT STATUS"
.PP
.B copy
does not \(lqmove\(rq
.IR them .
See
.BR move (1).
.TP
\fB\-v\fR, \fB\-\-verbose\fR
say what\*(Aqs done
.IP \(bu 2
a point
.TS
l l.
a	table
.TE
.nf
copy a b
copy c\ \fId\fP
.fi
After \s-1SMALL\s0 \\n \[u00E9]\&.
"""
MDOC = r""".Dd May 1, 2026
.Dt SEND 1
.Sh NAME
.Nm send
.Nd send a file
.Sh SYNOPSIS
.Nm
.Op Fl v
.Ar file
.Sh DESCRIPTION
.Nm
reads
.Ar file ;
see
.Xr cat 1 .
"""


def test_a_page_becomes_paragraphs_of_whole_lines():
    assert manual_text(MAN).split("\n\n") == [
        "NAME",
        "copy - copy files",
        "EXIT STATUS",
        'copy does not "move" them. See move(1).',
        "-v, --verbose say what's done",
        "* a point\ncopy a b\ncopy c d After SMALL \\n é.\n",
    ]


def test_a_page_of_the_bsds_is_read_too():
    assert manual_text(MDOC).split("\n\n") == [
        "NAME", "send send a file", "SYNOPSIS", "send -v file", "DESCRIPTION",
        "send reads file; see cat(1).\n",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "source", ["", ".", "'", ".SH", ".IP", ".Xr", '.B "open', "\\", ".if \\{", ".de x", "\\(", ".Xr a"]
)
def test_any_text_is_a_page(source):
    assert isinstance(manual_text(source + "\n" + source), str)


@pytest.mark.parametrize("piece", ["\\*[", "\\h'", '"', '.B "', " ", "\n ", "Fl ", "\\", ".if \\{\n"])
def test_any_page_is_read_in_time_by_its_length(piece):
    assert isinstance(manual_text(".B " + piece * 100_000), str)
