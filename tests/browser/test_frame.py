"""The frame that all panels share, over a model that answers when the test lets it."""

from saewb_widgets.panel import source

_MADE = """
  window.open_ = [];
  const model = { get: () => "", set() {}, save_changes() {}, on() {}, off() {}, widget_manager: {},
    send: (what, callbacks) => open_.push([what.do, callbacks]) };
  window.answer = () => open_.splice(0).forEach(([, c]) => c.iopub.status({ content: { execution_state: "idle" } }));
  framed({ model, el: document.body }, "x", ({ ask }) => { window.ask_ = ask; });
"""


def test_a_kernel_that_does_not_answer_is_said_to_be_busy(page):
    page.evaluate("code => { new Function(code)(); }", f"{source('shared/frame.js')}\n{_MADE}")
    late = page.locator(".late")
    page.evaluate("ask_('pause')")
    page.wait_for_timeout(1000)
    assert late.is_hidden()  # it is not known whether answers are told here
    page.evaluate("answer()")
    page.evaluate("ask_('pause')")
    page.locator(".late:visible", has_text="waiting for the kernel, which is busy").wait_for()
    page.evaluate("answer()")
    late.wait_for(state="hidden")
