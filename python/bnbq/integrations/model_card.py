"""The model card's line that says `import bnbq`, in what Transformers saves and pushes."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.utils.hub import PushToHubMixin

from .. import checkpoint


class UploadWithCard:
    """Stands for a model's ``_upload_modified_files``: the card that Transformers has just written gets the line
    that says `import bnbq`. An attribute of the models that we load; no class of Transformers is changed."""

    def __call__(self, working_dir, repo_id, files_timestamps, commit_message=None, **kwargs):
        checkpoint.write_model_card(working_dir)
        return PushToHubMixin._upload_modified_files(
            self, working_dir, repo_id, files_timestamps, commit_message=commit_message or "Upload model", **kwargs
        )


def card_beside_the_files(frame) -> None:
    """Give a directory that `save_pretrained` is writing a README.md, unless it has one.

    Transformers tells a quantiser everything about saving but where to: the directory is read from the frame of
    ``save_pretrained``, which called. Another caller, or a later Transformers, simply gets no file.
    """
    if frame.f_code.co_name != "save_pretrained" or not frame.f_locals.get("is_main_process", True):
        return
    directory = frame.f_locals.get("save_directory")
    if (
        isinstance(directory, (str, os.PathLike))
        and os.path.isdir(directory)
        and not (Path(directory) / "README.md").exists()
    ):
        checkpoint.write_model_card(directory)
