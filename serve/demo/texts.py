"""What the page says of its models: for who opens it after a bundle was replaced, of the new one.

Gradio keeps a page as its configuration, which every visitor is handed; so nothing is built again. A page
that is open meanwhile shows what it showed, and is answered by the new model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr
from gradio.processing_utils import move_files_to_cache
from pydantic import BaseModel

C = TypeVar("C", bound=gr.components.Component)
Make = Callable[[], Any]
"""-> what a component shows, of the models as they are now."""


class Texts:
    """The components of a page whose values depend on what the bundles hold."""

    def __init__(self, title: Make) -> None:
        self._title, self._shown = title, list[tuple[gr.components.Component, Make]]()

    def of(self, make: Make, build: Callable[[Any], C]) -> C:
        """-> the component that `build` makes of a value; `renew` gives it another one."""
        component = build(make())
        self._shown.append((component, make))
        return component

    def renew(self, page: gr.Blocks) -> None:
        """Make every value again."""
        page.title = self._title()
        for component, make in self._shown:
            value = component.postprocess(make())
            # as a component's own constructor does it
            plain = value.model_dump() if isinstance(value, BaseModel) else value
            component.value = move_files_to_cache(plain, component, postprocess=True, keep_in_cache=True)
        page.config = page.get_config_file()
