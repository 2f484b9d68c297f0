"""HubModel: `save_pretrained`, `from_pretrained` and `push_to_hub` as models of huggingface_hub have them.

The files are those of `moe_mtl.save`, `load` and `push`; there is no second format.
"""

import os
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin

from moe_mtl.tasks import nearest


class HubModel(PyTorchModelHubMixin):
    """Base of the models that can be saved: the mixin of huggingface_hub on the files of this library.

    The mixin's own `save_pretrained` deletes config.json before it writes, so that a save that fails would take the
    model that was there with it; its `from_pretrained` asks the hub first for whatever is no folder.
    """

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """`moe_mtl.save`, and `push_to_hub` where asked for.

        Args:
            save_directory: folder, made when missing.
            config: refused: a model of this library has its own.
            repo_id: where to push; the folder's name when None.
            push_to_hub: also push.
            model_card_kwargs: refused: write a README.md of your own, which stays.
            **push_to_hub_kwargs: for `push_to_hub`.

        Returns:
            The address of the commit, None without a push.

        Raises:
            ValueError: an option that does not apply, or a model that cannot be saved.
            OSError: the folder cannot be written to; what it held is unchanged.
        """
        _refuse(config=config, model_card_kwargs=model_card_kwargs)
        if push_to_hub_kwargs and not push_to_hub:
            raise ValueError(f"{', '.join(push_to_hub_kwargs)}: only with push_to_hub=True")
        self._save_pretrained(Path(save_directory))
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(save_directory).name, **push_to_hub_kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """`moe_mtl.load`, for a model of this class.

        Args:
            pretrained_model_name_or_path: folder, pretrained model `<model>.<tag>`, or `owner/name` on the hub.
            force_download: download again what is cached.
            token: of the hub; None for the stored one.
            cache_dir: of the hub's files; None for its client's.
            local_files_only: take what is cached, download nothing.
            revision: branch, tag or commit on the hub.
            **model_kwargs: `map_location`, the device to move the model to; "cpu" when absent.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError, ConnectionError, ValueError: as `moe_mtl.load`; or the model is of another class, or an
                option is unknown.
        """
        return cls._from_pretrained(
            model_id=os.fspath(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            **model_kwargs,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config: Any = None,
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **upload: Any,
    ) -> str:
        """`moe_mtl.push`, by the names of the mixin; `upload` holds create_pr and allow_, ignore_, delete_patterns."""
        from moe_mtl.hub import push

        _refuse(config=config, model_card_kwargs=model_card_kwargs)
        how = {"private": private, "revision": branch, "commit_message": commit_message, "token": token}
        return push(self, repo_id, **how, **upload)  # type: ignore[arg-type]

    def _save_pretrained(self, save_directory: Path) -> None:
        """The mixin's hook."""
        from moe_mtl.hub import save  # late: it builds what it loads out of these classes

        save(self, save_directory)  # type: ignore[arg-type]

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: Any = "cpu",
        **model_kwargs: Any,
    ) -> Self:
        """The mixin's hook."""
        from moe_mtl.hub import load
        from moe_mtl.locate import find

        for option in model_kwargs:
            raise ValueError(
                f"{option}: the folder says how its model is built and every weight must fit; "
                f"{nearest(option, ['map_location'])}"
            )
        how = {"cache_dir": cache_dir, "force_download": force_download, "token": token}
        model = load(find(model_id, revision, local_files_only=local_files_only, **how))
        if not isinstance(model, cls):
            kind, named = type(model).__name__, vars(model)["config"]["name"]
            raise ValueError(
                f"{model_id} holds a {kind} ({named!r}), no {cls.__name__}; use {kind}.from_pretrained, "
                "or moe_mtl.load, which takes any"
            )
        return model.to(map_location)


def _refuse(**options: Any) -> None:
    """Refuses options of the mixin that would do nothing here."""
    for name, value in options.items():
        if value:
            raise ValueError(f"{name}: has no place here: the configuration and the card are made from the model")
