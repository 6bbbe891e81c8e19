"""Texts that run, load or lead somewhere if they are taken for HTML or Markdown, and a watch for it."""

from __future__ import annotations

import re

from helpers.page_tabs import box, expect

PAYLOADS = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload='window.hacked = 1'></svg>",
    "<iframe src='https://evil.example/'></iframe>",
    "<a href='javascript:window.hacked = 1'>click</a>",
    "<details open ontoggle='window.hacked = 1'>x</details>",
    "<style>@import 'https://evil.example/a.css';</style>",
    "<link rel=stylesheet href=https://evil.example/a.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<base href='https://evil.example/'>",
    "<form action=https://evil.example/><button autofocus onfocus='window.hacked = 1'>x</button></form>",
    "<video src=https://evil.example/v autoplay onerror='window.hacked = 1'></video>",
    "![image](https://evil.example/i.png)",
    "[![image](https://evil.example/j.png)](https://evil.example/)",
    "![image][1]\n\n[1]: https://evil.example/k.png",
    "[link](javascript:window.hacked=1)",
    "<https://evil.example/auto> and https://evil.example/bare and www.evil.example",
    "```html\n<script>window.hacked = 1</script>\n<img src=https://evil.example/l.png>\n```",
    "```mermaid\ngraph TD; A[<img src=x onerror='window.hacked=1'>]\n```",
    "$\\href{javascript:window.hacked=1}{x}$ $$\\includegraphics{https://evil.example/m.png}$$",
    ":material/home: :red[x] &lt;script&gt;window.hacked=1&lt;/script&gt; \u202etxt\u202c \x1b[31mred",
    "</textarea></div><script src=https://evil.example/s.js></script>",
)
FOREIGN = """() => [...document.querySelectorAll("#root " + [
    "a[href]:not([data-testid=stSkipToContent])", "img", "iframe", "object", "embed", "video", "audio",
    "script", "link", "meta", "base", "form[action]"
].join(", #root "))].map(element => element.outerHTML)"""


class Watched:
    """Opens tabs. Nothing that is shown in them may run, load or lead anywhere."""

    def __init__(self, new_tab, address: str):
        self.new_tab, self.address, self.seen, self.tabs = new_tab, address, [], []

    def __call__(self, address: str = ""):
        address = address or self.address
        ours = re.match("http://[^/?]+", address)[0]

        def went(url: str) -> None:
            if not url.startswith((ours, "data:image", "about:blank")):
                self.seen.append(url)

        tab = self.new_tab("about:blank")
        tab.on("dialog", lambda dialog: (self.seen.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: went(request.url))
        tab.on("popup", lambda popup: self.seen.append(popup.url))
        tab.on("framenavigated", lambda frame: went(frame.url))
        tab.goto(address)
        expect(box(tab)).to_be_visible()
        self.tabs.append((tab, tab.locator("script").count()))
        return tab

    def check(self):
        for tab, scripts in self.tabs:
            tab.wait_for_timeout(300)
            assert tab.evaluate("window.hacked") is None
            assert tab.locator("script").count() == scripts
            assert tab.evaluate(FOREIGN) == []
        assert self.seen == []
