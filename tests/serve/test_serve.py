"""serve: its API in a real process, its limits, and its page in a real browser."""

import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from models import build, small_config
from videos import write_numbered

from zeroi2v import merge
from zeroi2v.cli import run
from zeroi2v.serve import main as serve
from zeroi2v.serve.limits import Limits, Refused
from zeroi2v.serve.worker import TooSlow, Worker

ROOT = Path(__file__).parents[2]
LABELS = tuple(f"class <{i}>" for i in range(11))


class Server:
    """A server process on a free port, with a folder of videos."""

    def __init__(self, folder: Path, *words: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.folder = f"http://127.0.0.1:{port}", folder
        words = (str(folder / "merged"), "--folder", str(folder / "videos"), *words)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zeroi2v.serve", *words, "--port", str(port)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.said = self.process.stdout.readline()
        assert "serving" in self.said, self.said + self.process.stdout.read()
        for _ in range(600):
            try:
                self.about = self.ask("GET", "about")[1]
                break
            except OSError:
                time.sleep(0.1)

    def ask(self, method: str, door: str, data: bytes | None = None, **headers) -> tuple[int, dict]:
        request = urllib.request.Request(f"{self.url}/api/{door}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=100) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def memory(self) -> int:
        """Resident bytes of the server and its worker."""
        pids, found = [self.process.pid], 0
        for pid in pids:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pids += map(int, children)
            found += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        return found

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    merge(build(small_config(labels=LABELS))).save_pretrained(folder / "merged")
    videos = folder / "videos"
    videos.mkdir()
    write_numbered(videos / "short.mp4", 30)
    write_numbered(videos / "long.mp4", 300)
    (videos / "bad.mp4").write_text("no video")
    (folder / "secret.mp4").write_bytes((videos / "short.mp4").read_bytes())
    (videos / "link.mp4").symlink_to(folder / "secret.mp4")
    write_day(videos / "day.mkv")
    write_wide(videos / "wide.mkv", 16000)
    write_wide(videos / "large.mkv", 4000)
    return folder


def write_day(path: Path) -> None:
    """A Matroska file of a second, whose header promises a day."""
    data = bytearray(Path(write_numbered(path, 30)).read_bytes())
    struct.pack_into(">d", data, data.index(b"\x44\x89\x88") + 3, 24 * 3600 * 1000.0)
    path.write_bytes(data)


def write_wide(path: Path, side: int) -> None:
    """A Matroska file of MJPEG, whose headers promise `side` x `side` pixels."""
    data = Path(write_numbered(path, 3, codec="mjpeg", size=(288, 384))).read_bytes()
    large = struct.pack(">H", side)
    for old, new in (
        (b"\xb0\x82\x01\x80", b"\xb0\x82" + large),
        (b"\xba\x82\x01\x20", b"\xba\x82" + large),
        (b"\xff\xc0\x00\x11\x08\x01\x20\x01\x80", b"\xff\xc0\x00\x11\x08" + 2 * large),
    ):
        assert old in data
        data = data.replace(old, new)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def server(folder):
    pytest.importorskip("gradio", reason="needs the extra serve")
    server = Server(folder, "--max-megabytes", "5")
    yield server
    server.end()


def test_an_upload_and_a_path_give_the_classes(server, folder):
    data = (folder / "videos/short.mp4").read_bytes()
    status, uploaded = server.ask("POST", "predict?name=my.mp4&topk=3", data)
    assert status == 200
    (result,) = uploaded["results"]
    assert len(result["topk"]) == 3 and result["topk"][0]["label"] in LABELS
    assert result["timeline"] is None and uploaded["seconds"] == pytest.approx(1, abs=0.3)
    assert server.ask("POST", "predict?path=short.mp4&topk=3")[1] == uploaded
    assert server.about["models"][0]["labels"] == list(LABELS)


def test_a_long_video_has_a_timeline(server):
    answer = server.ask("POST", "predict?path=long.mp4&timeline=true")[1]
    line = answer["results"][0]["timeline"]
    assert line["windows"][-1]["end"] == pytest.approx(line["seconds"])
    assert len(line["windows"]) > 2 and answer["seconds"] == line["seconds"]


@pytest.mark.parametrize(
    ("door", "status", "line"),
    [
        ("path=../secret.mp4", 403, "path must lie in the folder of --folder: got ../secret.mp4"),
        ("path=/etc/passwd", 403, "path must lie in the folder of --folder: got /etc/passwd"),
        ("path=link.mp4", 403, "path must lie in the folder of --folder: got link.mp4"),
        ("path=none.mp4", 404, "path must name a file in the folder of --folder: got none.mp4"),
        ("path=a%00b", 400, "path must be the name of a file"),
        ("path=bad.mp4", 400, "bad.mp4: Invalid data found when processing input"),
        ("path=day.mkv", 400, "day.mkv: video must be at most 60 minutes long: its header "
                              "promises 1440"),
        ("path=wide.mkv", 400, "wide.mkv: frames must be at most 67108864 pixels: got "
                               "16000x16000"),
        ("path=large.mkv", 400, "large.mkv: frames must be at most 9 megapixels: got 4000x4000"),
        ("topk=0", 400, "topk must be in 1..1000: got 0"),
        ("timeline=1", 400, "timeline must be true or false: got 1"),
        ("pth=x", 400, "query must be of name, path, topk, timeline: got pth"),
        ("name=x.mp4", 400, "request must hold a video, or name one by path: got nothing"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line(server, door, status, line):
    assert server.ask("POST", f"predict?{door}") == (status, {"error": line})


def test_uploads_are_limited_whether_or_not_they_say_their_size(server):
    line = {"error": "big: must be at most 5 MB"}
    assert server.ask("POST", "predict?name=big", bytes(6_000_000)) == (413, line)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as door:
        head = f"POST /api/predict?name=big HTTP/1.1\r\nHost: {host}\r\n"
        door.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        door.sendall(60 * (b"186a0\r\n" + bytes(100_000) + b"\r\n") + b"0\r\n\r\n")
        assert b"413" in door.recv(1000)


def test_another_host_name_is_refused(server):
    request = urllib.request.Request(f"{server.url}/api/about", headers={"Host": "example.org"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=30)


def test_many_mixed_requests_are_all_answered_and_leave_no_memory(server, folder):
    good = (folder / "videos/short.mp4").read_bytes()
    kinds = [
        (200, "predict?name=a.mp4", good),
        (400, "predict?name=cut.mp4", good[: len(good) // 3]),
        (400, "predict?path=wide.mkv", None),
        (413, "predict?name=huge.mp4", bytes(5_500_000)),
        (400, "predict?path=bad.mp4", None),
    ]

    def ask(i: int) -> bool:
        status, door, data = kinds[i % len(kinds)]
        return server.ask("POST", door, data)[0] == status

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(10)))
        before = server.memory()
        assert all(pool.map(ask, range(40)))
    assert server.memory() < before + 60e6


def test_a_full_queue_says_so(folder, monkeypatch):
    worker = Worker.__new__(Worker)
    worker._limits = Limits(queue=1)
    worker._count = worker._turn = threading.RLock()
    worker._waiting = 2
    with pytest.raises(Exception, match="the server is busy: 1 requests wait already"):
        worker.ask("about")


def test_a_worker_that_dies_or_hangs_is_replaced(folder):
    worker = Worker([str(folder / "merged")], "cpu", Limits(seconds=60))
    try:
        worker.wait()
        first = worker._process.pid
        os.kill(first, signal.SIGKILL)
        worker._process.join(30)
        video = str(folder / "videos/short.mp4")
        assert worker.ask("classify", video, 1, False)["results"]
        second = worker._process.pid
        worker._limits = Limits(seconds=0.001)
        with pytest.raises(TooSlow, match="longer than the time limit of 0.001 s"):
            worker.ask("classify", str(folder / "videos/long.mp4"), 1, True)
        worker._limits = Limits(seconds=60)
        with pytest.raises(Refused, match="Invalid data"):
            worker.ask("classify", str(folder / "videos/bad.mp4"), 1, False)
        assert len({first, second, worker._process.pid}) == 3
        assert worker.ask("attention", video, 0, 0.5)[:4] == b"\x89PNG"
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["a", "b", "c"], "models must be at most 2: got 3"),
        (["a", "--folder", "gone"], "--folder must be a folder: got gone"),
        (["a", "--max-queue", "0"], "--max-queue must be positive: got 0"),
        (["a", "--port", "99999"], "--port must be in 0..65535: got 99999"),
        (["gone"], "model folder not found: gone"),
    ],
)
def test_bad_input_is_one_line(words, line, capsys, monkeypatch):
    if words == ["gone"]:  # found out while the page is made
        pytest.importorskip("gradio", reason="needs the extra serve")
    monkeypatch.setattr("zeroi2v.serve.main.require", lambda *names: None)
    assert run(serve.main, words) == 1
    assert capsys.readouterr().err.strip().endswith(line)


def test_a_taken_port_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("zeroi2v.serve.main.require", lambda *names: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(serve.main, ["gone", "--port", str(port)]) == 1
    assert f"must be free: got 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "yes"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_what_only_this_machine_reaches(host, yes):
    assert serve.is_loopback(host) is yes


@pytest.fixture
def browsers():
    """Opens headless browsers, as many as are asked for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if None in found:
        pytest.skip("needs chromium and its driver")
    opened = []

    def browser(width: int = 1280, *more: str):
        options = webdriver.ChromeOptions()
        for word in (
            "headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync",
            "disable-background-networking", "disable-dev-shm-usage",
            f"user-data-dir={tempfile.mkdtemp()}", f"window-size={width},900",
            *more,
        ):  # fmt: skip
            options.add_argument(f"--{word}")
        options.binary_location = found[0]
        service = webdriver.ChromeService(found[1])
        opened.append(webdriver.Chrome(options=options, service=service))
        opened[-1].implicitly_wait(60)
        return opened[-1]

    yield browser
    for one in opened:
        one.quit()


def give(page, url: str, video: Path) -> None:
    page.get(url)
    page.find_element("css selector", "#clip input[type=file]").send_keys(str(video))
    page.find_element("css selector", "#clip video")
    page.find_element("css selector", "#go").click()


def test_the_page_in_a_browser_for_two_people_at_once(server, folder, browsers):
    one, two = browsers(), browsers(390)
    give(one, server.url, folder / "videos/long.mp4")
    give(two, server.url, folder / "videos/bad.mp4")
    assert two.find_element("css selector", ".z-problem").text.startswith("bad.mp4: Invalid data")
    parts = one.find_elements("css selector", ".z-line button")
    assert parts and parts[0].text in LABELS  # as text, though it looks like a tag
    one.implicitly_wait(0)
    seconds = one.execute_async_script(
        "const tell = arguments[0], v = document.querySelector('.z-player video');"
        "v.onseeked = () => tell(v.currentTime);"
        "const all = document.querySelectorAll('.z-line button'); v.currentTime = 1;"
        "setTimeout(() => all[all.length - 1].click(), 200);"
        "setTimeout(() => tell(v.currentTime), 3000);"
    )
    assert seconds >= 0
    one.implicitly_wait(60)
    one.find_element("css selector", "#look").click()
    assert one.find_element("css selector", "#picture img").get_attribute("src").startswith("data:")
    wide = two.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0


def write_camera(path: Path) -> None:
    """MJPEG for Chromium's fake camera: the left half of the picture is white, the right black."""
    with av.open(str(path), "w", format="mjpeg") as film:
        stream = film.add_stream("mjpeg", 25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
        picture = np.zeros((240, 320, 3), np.uint8)
        picture[:, :160] = 255
        film.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))


def test_the_page_classifies_what_the_webcam_saw_unmirrored(server, tmp_path, browsers):
    write_camera(tmp_path / "camera.mjpeg")
    page = browsers(
        1280, "use-fake-device-for-media-stream", "use-fake-ui-for-media-stream",
        f"use-file-for-fake-video-capture={tmp_path / 'camera.mjpeg'}",
    )  # fmt: skip
    page.get(server.url)
    page.find_element("css selector", "#clip [aria-label='Capture from camera']").click()
    page.find_element("xpath", "//*[@id='clip']//button[contains(., 'Webcam')]").click()
    record = page.find_element("css selector", "#clip [aria-label='start recording']")
    record.click()
    time.sleep(1.5)
    record.click()
    page.find_element("css selector", "#clip [aria-label='Clear']")  # it is uploaded
    icons = page.find_element("css selector", "#clip [data-testid=source-select]").rect
    clip = page.find_element("css selector", "#clip").rect
    assert icons["y"] + icons["height"] <= clip["y"] + clip["height"]
    page.find_element("css selector", "#go").click()
    player = page.find_element("css selector", ".z-player video")
    film = urllib.request.urlopen(player.get_attribute("src"), timeout=30).read()
    with av.open(io.BytesIO(film)) as container:
        assert container.duration / 1e6 == pytest.approx(1.5, abs=1)
        frame = next(container.decode(video=0)).to_ndarray(format="gray")
    left, right = (half.mean() for half in np.split(frame, 2, axis=1))
    assert left > 200 and right < 50
