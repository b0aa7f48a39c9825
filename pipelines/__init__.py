"""The steps of a QuaDMix run, each a function that composes stages over a run directory."""

if __name__ == "pipelines":
    raise ImportError("import from quadmix_plugin.pipelines, as in: from quadmix_plugin.pipelines import run")
