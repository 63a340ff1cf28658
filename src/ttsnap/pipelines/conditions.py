"""Pictures that a pipeline is given beside the prompt, and the pipeline of the same models that takes them.

A picture to start from (with a mask: to paint over), references of editing models, pictures that a ControlNet or a T2I
adapter is led by, pictures that an IP-Adapter reads. What diffusers has no pipeline for is said in one sentence.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ttsnap.files.pictures import beside, read_picture, resized
from ttsnap.pipelines.added_files import check_source, read_json, split, unfit
from ttsnap.pipelines.single_file import DENOISERS, Loaded

if TYPE_CHECKING:
    from PIL.Image import Image

# Of a pipeline's class, what is about its input; what is left names the family.
ROLES = re.compile(r"ControlNet(XS|Union)?|PAG|Img2Img|Inpaint(ing)?|Adapter|Pipeline$")
SEVERAL = (  # take several references as a list; of others a list is a batch
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "GlmImagePipeline",
    "JoyImageEditPlusPipeline",
    "QwenImage21Pipeline",
    "QwenImageEditPlusPipeline",
    "ZImageOmniPipeline",
)
BESIDE = ("FluxKontextPipeline",)  # take several references as one picture
WEIGHTS = {  # IP-Adapters that diffusers documents for these families, unless others are given
    "StableDiffusion": "h94/IP-Adapter/models/ip-adapter_sd15.safetensors",
    "StableDiffusionXL": "h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.safetensors",
    "Flux": "XLabs-AI/flux-ip-adapter/ip_adapter.safetensors",
}
FLUX_ENCODER = "openai/clip-vit-large-patch14"  # of the IP-Adapters of FLUX, which come without one
ARGUMENTS = (  # of pipelines' calls that are pictures
    "image",
    "images",
    "mask_image",
    "mask",
    "control_image",
    "control_mask",
    "image_reference",
    "ip_adapter_image",
)


class Control(NamedTuple):
    """A picture to be led by, the model that does so, and how much (None: as the pipeline does)."""

    image: str
    model: str
    scale: float | None

    @classmethod
    def read(cls, text: str) -> Control:
        """Of `IMAGE:MODEL` or `IMAGE:MODEL:SCALE`."""
        image, _, rest = text.partition(":")
        model, scale = split(rest)
        if not image or not model:
            raise ValueError(
                f"--control takes IMAGE:MODEL or IMAGE:MODEL:SCALE, such as edges.png:DIR:.8, got {text!r}"
            )
        return cls(image, model, None if scale is None else _number(scale, "--control"))


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Files of pictures, the models that read them, and how far an image may be left.

    Attributes:
        image: Start from this picture, or show it to an editing model; several where the model takes several
            references (may be repeated).
        mask: Paint only where this picture is white (inpainting).
        strength: How far from the image, above 0 and at most 1.
        control: Be led by a picture: IMAGE:MODEL or IMAGE:MODEL:SCALE, of a ControlNet, a union of them or a T2I
            adapter: directory, hub id or .safetensors file (may be repeated).
        control_image: Be led by this picture, where --model is a ControlNet or control pipeline itself.
        ip_adapter: Resemble this picture: IMAGE or IMAGE:SCALE (IP-Adapter; may be repeated).
        ip_adapter_weights: Of the IP-Adapter: FILE.safetensors or owner/name/folder/file.safetensors; one, or one for
            each picture (default: that of the model's family).
    """

    image: tuple[Path, ...] = ()
    mask: Path | None = None
    strength: float | None = None
    control: tuple[str, ...] = ()
    control_image: Path | None = None
    ip_adapter: tuple[str, ...] = ()
    ip_adapter_weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength:g}")
        if not self.image and (self.strength is not None or (self.mask and not self.control)):
            raise ValueError(f"{'a mask' if self.mask else 'strength'} needs an image to start from")
        if self.control and self.control_image:
            raise ValueError("give --control, or --control-image with a control pipeline as --model, not both")
        if self.ip_adapter_weights and len(self.ip_adapter_weights) not in (1, len(self.ip_adapter)):
            count, given = len(self.ip_adapter), len(self.ip_adapter_weights)
            raise ValueError(f"--ip-adapter-weights is one, or one for each of {count} --ip-adapter, got {given}")
        for _, model, _ in self.controls():
            check_source(model, "control model")
        self.adapters()
        for weights in self.ip_adapter_weights:
            check_source(weights, "IP-Adapter")
            if not weights.endswith(".safetensors"):
                raise ValueError(
                    "--ip-adapter-weights takes FILE.safetensors or owner/name/folder/file.safetensors, got "
                    f"{weights!r}"
                )

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def controls(self) -> list[Control]:
        """What `control` says."""
        return [Control.read(text) for text in self.control]

    def adapters(self) -> list[tuple[str, float]]:
        """Picture and scale of each `ip_adapter`."""
        found = []
        for text in self.ip_adapter:
            image, scale = split(text)
            found.append((image, 1.0 if scale is None else _number(scale, "--ip-adapter")))
        return found

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Pictures:
        """The pictures among the keywords of a library call, which are taken out where this is to read them.

        Files are read, and `control` and `ip_adapter` find the pipeline; pictures that are objects already are
        arguments of the pipeline's own call and stay.
        """
        given: dict[str, Any] = {}
        for name in ("control", "ip_adapter", "ip_adapter_weights"):
            if value := options.pop(name, None):
                given[name] = (value,) if isinstance(value, str) else tuple(value)
        for name, argument in (("image", "image"), ("mask", "mask_image"), ("control_image", "control_image")):
            if not _are_files(options.get(argument)):
                continue
            value = options.pop(argument)
            several = [Path(file) for file in (value if isinstance(value, list | tuple) else [value])]
            given[name] = tuple(several) if name == "image" else several[0]
        if "image" in given and options.get("strength") is not None:
            given["strength"] = options.pop("strength")
        return cls(**given)

    def settings(self) -> dict[str, Any]:
        """What decides the result, as a JSON object: the files' contents, when first asked for, not their names.

        Raises:
            ValueError: a file cannot be read.
        """
        return dict(self._settings)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for use, path in (("mask_image", self.mask), ("control_image", self.control_image)):
            if path:
                found[use] = _digest(path)
        if images := [_digest(path) for path in self.image]:
            found["image"] = images[0] if len(images) == 1 else images
        if self.control:
            found["control"] = [[_digest(image), model, scale] for image, model, scale in self.controls()]
        if self.ip_adapter:
            found["ip_adapter"] = [[_digest(image), scale] for image, scale in self.adapters()]
            found["ip_adapter_weights"] = list(self.ip_adapter_weights) or None
        return found | ({"strength": self.strength} if self.strength is not None else {})

    def sources(self) -> dict[str, str]:
        """Models of the machine or a hub that these pictures need, by what they are."""
        found = {f"control {model}": model for _, model, _ in self.controls()}
        return found | {f"IP-Adapter {weights}": weights for weights in self.ip_adapter_weights}

    def given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    # The pipeline.

    def check_against(self, model: str) -> None:
        """ValueError about what does not fit the model of a diffusers directory; nothing is loaded."""
        import diffusers

        kind = getattr(diffusers, str(read_json(Path(model) / "model_index.json").get("_class_name")), None)
        if kind is not None:
            self._kind(kind, {model: kind_of_control(model) for _, model, _ in self.controls()})

    def dress(self, loaded: Loaded) -> None:
        """Make of a pipeline the one that takes these pictures, with the models that read them.

        Raises:
            ValueError: diffusers has none, or a model does not fit.
        """
        self._find(loaded)
        if self.ip_adapter:
            _add_ip_adapter(loaded, self.adapters(), self.ip_adapter_weights)

    def _find(self, loaded: Loaded) -> None:
        pipe = loaded.pipe
        kinds = {model: kind_of_control(model) for _, model, _ in self.controls()}
        kind = self._kind(type(pipe), kinds)
        if kind is type(pipe):
            return
        parts, more = dict[str, Any](), ""
        if kinds:
            made = {source: _load_control(source, name, pipe) for source, name in kinds.items()}
            used = [made[model] for _, model, _ in self.controls()]
            if len(kinds) == 1 and _is_union(used[0][0]):
                used = used[:1]  # reads all the pictures
            name = "adapter" if "Adapter" in kind.__name__ else "controlnet"
            alone = len(self.control) == 1 or "Union" in kind.__name__
            several, line = [model for model, _ in used], f"[{', '.join(line for _, line in used)}]"
            if not alone and (multi := _multi_of(kind)) is not None:
                several, line = multi(several), f"diffusers.{multi.__name__}({line})"
            parts = {name: used[0][0] if alone else several}
            more = f", {name}={used[0][1] if alone else line}"
        try:
            loaded.pipe = _of_the_same_parts(kind, pipe, parts)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise unfit(next(iter(kinds), kind.__name__), pipe, error) from error
        loaded.lines.append(f"pipe = diffusers.{kind.__name__}.from_pipe(pipe, torch_dtype=pipe.dtype{more})")

    def _kind(self, kind: type, models: Mapping[str, str]) -> type:
        """The class of the pipeline that takes all this; `models`: classes of the control models, by their source."""
        import diffusers

        roles = {_role(name) for name in models.values()}
        if len(roles) > 1:
            raise ValueError(f"control models of one kind go together, got {' and '.join(sorted(roles))}")
        role, taken = next(iter(roles), ""), _taken(kind)
        if role == _role_of_pipeline(kind):
            role = ""
        leads = _is_led_by_image(kind)  # its image is the one to be led by
        starts = "image" in taken or "images" in taken
        if not role and (not self.image or (starts and not leads)) and (not self.mask or _mask_of(taken)):
            return kind
        family, pag = ROLES.sub("", kind.__name__), "PAG" if "PAG" in kind.__name__ else ""
        controls = [role] if role else [_role_of_pipeline(kind)]
        controls += ["ControlNet"] if role == "ControlNetUnion" else []
        tasks = ("Inpaint", "Inpainting") if self.mask else ("Img2Img",) if self.image and not _edits(kind) else ("",)
        for name in [f"{family}{control}{pag}{task}Pipeline" for control in controls for task in tasks]:
            if hasattr(diffusers, name):
                found: type = getattr(diffusers, name)
                _check_models(found, models)
                return found
        if not role and (other := _by_auto(kind, masked=self.mask is not None)) is not None:
            return other
        raise ValueError(f"diffusers has no variant of {kind.__name__} that {self._wish(role)}")

    def _wish(self, role: str) -> str:
        """What is asked of a pipeline, in words."""
        wishes = ["paints over a masked image" if self.mask else "starts from an image" if self.image else ""]
        leads = {"Adapter": "is led by a T2I adapter", "ControlNetXS": "is led by a ControlNet-XS"}
        wishes += [leads.get(role, "is led by a ControlNet") if role else ""]
        return " and ".join(filter(None, wishes))

    # The arguments.

    def arguments(self, pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the pipeline's call, with these pictures; where a size is asked for, they are made so large.

        References of editing models, which may be of any size, stay as they are.

        Raises:
            ValueError: the pipeline does not take them, or a file is no picture.
        """
        taken, name = _taken(type(pipe)), type(pipe).__name__
        width, height = options.get("width"), options.get("height")

        def fitted(picture: Image) -> Image:
            return resized(picture, (width, height)) if width and height else picture

        found = dict(self._images(type(pipe), taken, fitted))
        if self.mask:
            use = _mask_of(taken)
            assert use is not None
            found[use] = fitted(read_picture(self.mask))
        if self.control_image:
            if "control_image" not in taken and not _is_led_by_image(type(pipe)):
                raise ValueError(
                    f"{name} takes no control image; load a ControlNet pipeline, or name the control model: "
                    f"--control {self.control_image}:MODEL"
                )
            found[_control_of(taken)] = fitted(read_picture(self.control_image))
        if controls := self.controls():
            led = [fitted(read_picture(Path(control.image))) for control in controls]
            found[_control_of(taken)] = led if len(led) > 1 else led[0]
            scales = [1.0 if control.scale is None else control.scale for control in controls]
            if any(control.scale is not None for control in controls):
                use = next(part for part in taken if part.endswith("conditioning_scale"))
                found[use] = scales if len(scales) > 1 else scales[0]
        if adapters := [read_picture(Path(image)) for image, _ in self.adapters()]:
            found["ip_adapter_image"] = adapters if len(adapters) > 1 else adapters[0]
        if self.strength is not None:
            if "strength" not in taken:
                raise ValueError(f"{name} takes no strength: it paints anew with the picture in view; leave it out")
            found["strength"] = self.strength
        return {key: value for key, value in options.items() if key not in ("width", "height") or key in taken} | found

    def _images(self, kind: type, taken: Sequence[str], fitted: Any) -> Iterator[tuple[str, Any]]:
        pictures, name = [read_picture(path) for path in self.image], kind.__name__
        if not pictures:
            return
        if "image" not in taken and "images" not in taken:
            raise ValueError(f"{name} paints over its control image; leave out --image")
        use = "images" if "images" in taken else "image"
        if name in SEVERAL:
            yield use, pictures if len(pictures) > 1 or use == "images" else pictures[0]
        elif len(pictures) == 1:
            starts = "strength" in taken or self.mask or "height" not in taken
            yield use, fitted(pictures[0]) if starts else pictures[0]
        elif name in BESIDE:
            yield use, beside(pictures)
        elif "image_reference" in taken and len(pictures) == 2:
            yield use, fitted(pictures[0])
            yield "image_reference", pictures[1]
        else:
            raise ValueError(
                f"{name} takes one image, got {len(pictures)}; FLUX.2 and Qwen-Image-Edit-Plus take several"
            )


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} takes a number as its scale, such as :.6, got {text!r}") from None


def _are_files(value: Any) -> bool:
    """Whether an argument names files of pictures."""
    items = value if isinstance(value, list | tuple) else [value]
    return bool(items) and all(isinstance(item, str | Path) for item in items)


def _digest(path: Path | str) -> str:
    read_picture(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _taken(kind: type) -> list[str]:
    return list(inspect.signature(kind.__call__).parameters)


def _check_models(kind: type, models: Mapping[str, str]) -> None:
    """ValueError where a pipeline takes control models of another class."""
    parts = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    wanted = str(next((parts[name].annotation for name in ("controlnet", "adapter") if name in parts), ""))
    for source, name in models.items():
        if name and not re.search(rf"\b{name}\b", wanted):
            known = next(
                (word for word in re.findall(r"\w+", wanted) if re.search("ControlNet|Adapter", word)), "model"
            )
            raise ValueError(f"{source} is a {name}; {kind.__name__} takes a {known}")


def _multi_of(kind: type) -> Any:
    """The class that makes several control models one, of a pipeline that does not do so itself."""
    import diffusers

    parts = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    wanted = str(parts["controlnet"].annotation) if "controlnet" in parts else "list["
    name = next((word for word in re.findall(r"\w+", wanted) if "MultiControlNet" in word), "")
    return None if "list[" in wanted else getattr(diffusers, name, None)


def _mask_of(taken: Sequence[str]) -> str | None:
    """The argument for a mask."""
    return next((name for name in ("mask_image", "control_mask", "mask") if name in taken), None)


def _control_of(taken: Sequence[str]) -> str:
    """The argument for a picture to be led by."""
    return "control_image" if "control_image" in taken else "image"


def _is_led_by_image(kind: type) -> bool:
    """Whether a pipeline is led by the picture that it takes as `image`."""
    parts = inspect.signature(kind).parameters
    return bool({"controlnet", "adapter"} & set(parts)) and "control_image" not in _taken(kind)


def _edits(kind: type) -> bool:
    """Whether a pipeline takes references, which it does not start from."""
    taken = _taken(kind)
    return ("image" in taken or "images" in taken) and not _is_led_by_image(kind) and "strength" not in taken


def _by_auto(kind: type, *, masked: bool) -> type | None:
    """The class that diffusers' own table has for image-to-image or inpainting."""
    from diffusers.pipelines import auto_pipeline

    texts, images = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING
    wanted: Mapping[str, type] = auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING if masked else images
    names = [name for table in (texts, images) for name, known in table.items() if known is kind]
    return next((wanted[name] for name in names if name in wanted), None)


def _of_the_same_parts(kind: Any, pipe: Any, more: dict[str, Any]) -> Any:
    """A pipeline of another class with the same models and settings; dtypes and places of these stay as they are."""
    wanted = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in wanted}
    settings = {name: pipe.config[name] for name in wanted if name in pipe.config and name not in parts}
    made = kind(**settings | parts | more)
    made.register_to_config(_name_or_path=pipe.config.get("_name_or_path"))
    made.set_progress_bar_config(disable=True)
    return made


# Models that are led by pictures.


def kind_of_control(source: str) -> str:
    """Name of the class of a control model; that of a single file is left to the pipeline ('').

    Raises:
        ValueError: it says none, or one that diffusers does not have.
    """
    import diffusers

    if Path(source).is_file():
        return ""
    try:
        name = str(diffusers.ControlNetModel.load_config(source).get("_class_name"))
    except Exception as error:
        raise unfit(source, diffusers.ControlNetModel, error) from error
    if not ("ControlNet" in name or "Adapter" in name) or not hasattr(diffusers, name):
        raise ValueError(f"{source} is no ControlNet or T2I adapter that diffusers has: it says {name}")
    return name


def _role(name: str) -> str:
    """What control models of a class make of a pipeline's name."""
    if "Adapter" in name and "ControlNet" not in name:
        return "Adapter"
    return "ControlNetXS" if "XS" in name else "ControlNetUnion" if "Union" in name else "ControlNet"


def _role_of_pipeline(kind: type) -> str:
    found = re.search(r"ControlNet(XS|Union)?|Adapter", kind.__name__)
    return found[0] if found else ""


def _is_union(model: Any) -> bool:
    """Whether one network reads pictures of several kinds."""
    return "Union" in type(model).__name__ or bool(getattr(model, "union", False))


def _load_control(source: str, name: str, pipe: Any) -> tuple[Any, str]:
    """A control model on the device and in the dtype of a pipeline, and the Python that loads it."""
    import diffusers

    denoiser = next((getattr(pipe, part) for part in DENOISERS if getattr(pipe, part, None) is not None), None)
    method, place, options = "from_pretrained", source, {"use_safetensors": True}
    if Path(source).exists():
        place = str(Path(source).absolute())
    if not name:  # a single file is of the kind that goes with the denoiser
        family = type(denoiser).__name__.removesuffix("2DModel").removesuffix("Transformer")
        name = "ControlNetModel" if family.startswith("UNet") else f"{family}ControlNetModel"
        method, options = "from_single_file", {}
        if not hasattr(getattr(diffusers, name, None), method):
            raise ValueError(
                f"diffusers reads no single file of a control model of {type(pipe).__name__}; give a directory"
            )
    try:
        model = getattr(getattr(diffusers, name), method)(place, torch_dtype=pipe.dtype, **options)
    except Exception as error:
        raise unfit(source, pipe, error) from error
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    line = f"diffusers.{name}.{method}({place!r}, torch_dtype=pipe.dtype{given})"
    return model.eval().to(pipe.device), line


def _add_ip_adapter(loaded: Loaded, adapters: Sequence[tuple[str, float]], weights: Sequence[str]) -> None:
    pipe = loaded.pipe
    name, family = type(pipe).__name__, ROLES.sub("", type(pipe).__name__)
    if not hasattr(pipe, "load_ip_adapter") or "ip_adapter_image" not in _taken(type(pipe)):
        raise ValueError(f"{name} takes no IP-Adapter in diffusers; leave it out")
    sources = list(weights) or [WEIGHTS.get(family, "")]
    if not sources[0]:
        raise ValueError(f"no IP-Adapter of {name} is known; name its weights with --ip-adapter-weights")
    sources *= len(adapters) // len(sources)
    options = [_ip_adapter_options(source, pipe) for source in sources]
    columns = {key: [one[key] for one in options] for key in options[0]}
    given = {key: values[0] if len(set(values)) == 1 else values for key, values in columns.items()}
    if len(options) > 1:  # as many weights as pictures, even where they are the same
        given["weight_name"] = columns["weight_name"]
    scales = [scale for _, scale in adapters]
    scale = scales if len(scales) > 1 else scales[0]
    if "image_encoder_dtype" in inspect.signature(pipe.load_ip_adapter).parameters:
        given["image_encoder_dtype"] = pipe.dtype
    try:
        pipe.load_ip_adapter(**given)
        pipe.set_ip_adapter_scale(scale)
    except Exception as error:
        raise unfit(sources[0], pipe, error) from error
    if getattr(pipe, "image_encoder", None) is None:
        raise ValueError(
            f"{sources[0]} has no image encoder beside it, and {name} has none: put its folder image_encoder there"
        )
    pipe.image_encoder.eval()
    written = ", ".join(f"{key}={value!r}" for key, value in given.items())
    loaded.lines.append(f"pipe.load_ip_adapter({written}); pipe.set_ip_adapter_scale({scale})")


def _ip_adapter_options(source: str, pipe: Any) -> dict[str, Any]:
    """Arguments of a pipeline's `load_ip_adapter` for a file, or a file of a repository."""
    takes = inspect.signature(pipe.load_ip_adapter).parameters
    path, own = Path(source), getattr(pipe, "image_encoder", None) is not None
    if path.is_file():
        root, folder = path.absolute().parent, ""
        encoder = next(
            (f for f in (root / "image_encoder", root.parent / "models" / "image_encoder") if f.is_dir()), None
        )
        if encoder is not None and encoder.parent != root:
            root, folder = root.parent, root.name
        place, inside = str(root), str(encoder.relative_to(root)) if encoder else None
        elsewhere = str(encoder) if encoder else None
    else:
        owner, name, *folders, file = source.split("/")
        path, place, folder = Path(file), f"{owner}/{name}", "/".join(folders)
        inside, elsewhere = ("models/image_encoder" if "vit-h" in file else "image_encoder"), FLUX_ENCODER
    found: dict[str, Any] = {next(iter(takes)): place, "subfolder": folder, "weight_name": path.name}
    if "image_encoder_folder" in takes:
        found["image_encoder_folder"] = None if own else inside
    else:
        found["image_encoder_pretrained_model_name_or_path"] = None if own else elsewhere
    return found


__all__ = ["ARGUMENTS", "Control", "Pictures"]
