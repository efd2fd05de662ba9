"""How a program asks what the page asks: the server's own protocols, not Gradio's."""

from __future__ import annotations

import gradio as gr

from serve.server.service import Service

TEXT = """
### Photographs to labels

```text
curl -F file=@photo.jpg {url}/classify
curl -F file=@a.jpg -F file=@b.jpg '{url}/classify?model={model}&top_k=3'
```

```text
import requests

answer = requests.post("{url}/classify", files={{"file": open("photo.jpg", "rb")}}).json()
print(answer["images"][0]["label"])
```

### Tensors, batches, metadata

The Open Inference Protocol, which KServe's and Triton's clients speak:

```text
curl {url}/v2/models/{model}
```

Models here: {models}. Everything about it: docs/serving.md.
"""
ALONE = "This server shows the page alone; `ffl-serve` answers programs too, at /classify and /v2."


def api_tab(service: Service) -> None:
    """Build the tab."""
    if not service.settings.protocol:
        gr.Markdown(ALONE)
        return
    names = list(service.models)
    url = service.url or "http://127.0.0.1:7860"
    gr.Markdown(TEXT.format(url=url, model=names[0], models=", ".join(names)), elem_id="api")
