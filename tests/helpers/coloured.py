"""Videos whose frames say how their colours are meant: matrix and range."""

import av
import numpy as np

UNTAGGED = 2


def planes(height: int, width: int, full: bool) -> list[np.ndarray]:
    """Y', Cb and Cr of soft random colours, 4:2:0, well inside of the range."""
    rng = np.random.default_rng(0)
    low, high = (60, 190) if full else (70, 170)
    out = []
    half = (height // 2, width // 2), (112, 144)
    for shape, (a, b) in (((height, width), (low, high)), half, half):
        grid = rng.uniform(a, b, (4, 4))
        out.append(np.kron(grid, np.ones((shape[0] // 4, shape[1] // 4))).round().astype(np.uint8))
    return out


def tagged_frame(size: tuple[int, int], tag: int, full: bool) -> av.VideoFrame:
    frame = av.VideoFrame(size[1], size[0], "yuv420p")
    for plane, values in zip(frame.planes, planes(*size, full), strict=True):
        wide = np.zeros((plane.height, plane.line_size), np.uint8)
        wide[:, : plane.width] = values
        plane.update(wide.tobytes())
    frame.colorspace, frame.color_range = tag, 2 if full else 1
    return frame


def write_tagged(path, codec: str, tag: int | None, full: bool | None, size=(144, 176)) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = {"crf": "4", "b:v": "0", "deadline": "realtime", "cpu-used": "8"}
        if codec == "libx264":
            stream.options = {"qp": "4", "preset": "ultrafast", "g": "4"}
        if tag is not None:
            stream.codec_context.colorspace = tag
        if full is not None:
            stream.codec_context.color_range = 2 if full else 1
        for i in range(8):
            frame = tagged_frame(size, UNTAGGED if tag is None else tag, bool(full))
            frame.pts = i
            if codec == "mjpeg":
                frame = frame.reformat(format="yuvj420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)
