"""Reports in a real browser (Debian's chromium, headless): `make test-browser`, not part of `make test`."""

import shutil
import time

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from test_captions import train_run as train_phrases
from test_report import HOSTILE, embedded, predictions, train_run

import report
from data import RELATIONS
from parts.files import write_json_lines

COPIES = 9  # of the 8 posts: more than are drawn at once
# What is predicted of the first four words, B-PER I-PER O B-LOC in gold: all right, then each kind of error.
ANSWERS = ("B-PER I-PER O B-LOC", "B-PER O O B-LOC", "O O O O", "B-ORG I-ORG O B-LOC",
           "B-PER I-PER B-MISC B-LOC")  # fmt: skip
KINDS = ("all", "with errors", "missed", "spurious", "wrong type", "wrong boundary", "all correct")


@pytest.fixture(scope="module")
def pages(tmp_path_factory, flags, data_dir):
    """{name: report} of two runs, their predictions changed to hold every kind of error and hostile text."""
    root, made = tmp_path_factory.mktemp("pages"), {}
    for name in ("clip-bert", "mnre"):
        run = train_run(name, root / name, flags, data_dir)
        split, records = predictions(run)
        changed = []
        for copy in range(COPIES):
            for i, record in enumerate(records):
                record = record | {"id": f"{record['id']}+{copy}"}
                if name == "mnre":
                    record |= {"gold": RELATIONS[i],
                               "predicted": RELATIONS[(i * (copy % 3) + copy // 3) % 12]}  # fmt: skip
                else:
                    words = [*record["words"], *(HOSTILE if copy == 0 else ["long" * 20])]
                    rest = ["O"] * (len(words) - 4)
                    record |= {"words": words, "gold": [*ANSWERS[0].split(), *rest]}
                    record["predicted"] = [*ANSWERS[(i + copy) % 5].split(), *rest]
                    record["probability"] = [0.5] * len(words)
                changed.append(record)
        write_json_lines(run / f"predictions-{split}.jsonl", changed)
        best = {"clip-bert": 1, "mnre": 12}[name]  # epochs: an early one, a late one
        log = [{"epoch": i, "loss": 1.5 / i, "valid_main_f1": 1 - abs(i - best) / 13, "valid_accuracy": 0.9,
                "best_epoch": min(i, best)} for i in range(1, 13)]  # fmt: skip
        write_json_lines(run / "log.jsonl", log)
        made[name] = report.main(["--run", str(run), "--output", str(root / f"{name}.html")])
    return made


@pytest.fixture(scope="module")
def chromium():
    """A headless chromium that counts what alert() is given."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.fail("no chromium here: apt-get install chromium chromium-driver", pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    source = "window.alerts = []; window.alert = text => alerts.push(text);"
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    yield driver
    driver.quit()


@pytest.fixture(params=["clip-bert", "mnre"])
def page(request, chromium, pages):
    """(driver with a report open, the JSON in it); then its console is empty and no post has run anything."""
    chromium.get(f"file://{pages[request.param]}")
    yield chromium, embedded(pages[request.param])
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return alerts") == []
    assert len(chromium.find_elements(By.CSS_SELECTOR, "script:not([type='text/plain'])")) == 2
    fetched = chromium.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert [name for name in fetched if not name.startswith("data:")] == []


def expected(content, kind, type_):
    """How many posts a filter should show, counted from the spans."""
    count = 0
    for post in content["posts"]:
        spans = [span for span in post["spans"] if not type_ or type_ in span[2:4]]
        found = {span[4] for span in spans}
        if kind == "all":
            count += not type_ or bool(spans)
        elif kind == "all correct":
            count += {span[4] for span in post["spans"]} <= {"correct"} and (not type_ or bool(spans))
        else:
            count += bool(found - {"correct"}) if kind == "with errors" else kind in found
    return count


def choose(driver, kind):
    driver.find_element(By.XPATH, f"//label[input/@value='{kind}']").click()


def test_every_filter_shows_what_it_says(page):
    driver, content = page
    kinds = [kind for kind in KINDS if content["ner"] or kind != "wrong boundary"]
    select = Select(driver.find_element(By.TAG_NAME, "select"))
    types = [option.get_attribute("value") for option in select.options]
    spans = [span for post in content["posts"] for span in post["spans"]]
    assert types[0] == "" and set(types[1:]) == {type_ for span in spans for type_ in span[2:4]} - {None}
    for kind in kinds:
        choose(driver, kind)
        for type_ in types:
            select.select_by_value(type_)
            count = expected(content, kind, type_)
            said = driver.find_element(By.TAG_NAME, "output").text
            assert said == f"{count} of {len(content['posts'])} {'posts' if content['ner'] else 'rows'}"
            label = driver.find_element(By.XPATH, f"//label[input/@value='{kind}']").text
            assert (label == f"{kind} {count}"
                    and select.first_selected_option.text == f"{type_ or 'any'} ({count})")  # fmt: skip
            assert len(driver.find_elements(By.TAG_NAME, "article")) >= min(count, 30)
        assert expected(content, kind, "") > 0, kind  # the test has something to tell apart
        select.select_by_value("")
    assert expected(content, "with errors", "") < len(content["posts"])


def test_posts_are_drawn_as_they_are_reached(page):
    driver, content = page
    titles = "return [...document.querySelectorAll('article h3')].map(node => node.firstChild.textContent)"
    assert len(driver.execute_script(titles)) < len(content["posts"])
    for _ in range(20):
        driver.execute_script("scrollTo(0, document.body.scrollHeight)")
        time.sleep(0.1)
    assert driver.execute_script(titles) == [post["id"] for post in content["posts"]]
    assert not driver.find_element(By.ID, "more").is_displayed()
    texts = ("return [...document.querySelectorAll('%s')].map("
             "node => [...node.querySelectorAll('%s')].map(part => part.textContent))")  # fmt: skip
    shown = driver.execute_script(texts % (".words", ".word"))
    assert shown == [post["words"] for post in content["posts"]]
    kinds = [[span[4] for span in post["spans"]] for post in content["posts"]]
    if content["ner"]:  # correct entities need no line
        kinds = [[kind for kind in post if kind != "correct"] for post in kinds]
    assert driver.execute_script(texts % (".lines", "b")) == kinds


def test_gold_and_predicted_are_marked_on_their_words(page):
    driver, content = page
    for article, post in zip(
        driver.find_elements(By.TAG_NAME, "article")[:10], content["posts"], strict=False
    ):
        cells = article.find_elements(By.CLASS_NAME, "cell")
        for row, side in ((0, "gold"), (1, "pred")):
            tags = [cell.find_element(By.CLASS_NAME, f"row{row}") for cell in cells]
            classes = [set(tag.get_attribute("class").split()) for tag in tags]
            if content["ner"]:
                spans = [span for span in post["spans"] if span[2 + row] is not None]
                signs = [("", {True: " ✓", False: " ✗"}[span[4] == "correct"])[row] for span in spans]
                said = {s[0]: f"{side} {s[2 + row]}{sign}" for s, sign in zip(spans, signs, strict=True)}
            else:
                spans = [post["ends"][row]]
                said = {spans[0][0]: ("head", "tail")[row]}
            marked = [any(span[0] <= i < span[1] for span in spans) for i in range(len(cells))]
            assert [bool({"gold", "correct", "error", "tail"} & names) for names in classes] == marked
            assert [tag.text for tag in tags] == [said.get(i, "") for i in range(len(cells))]


def test_a_picked_word_shows_what_it_attended_to(page):
    driver, content = page
    cropped = [i for i, post in enumerate(content["posts"])
               if content["photos"][post["photo"]][1] != [0, 0, 1, 1]]  # fmt: skip
    assert bool(cropped) == content["ner"]  # CLIP's features, and ResNet50's
    index = (cropped or [0])[0]
    post = content["posts"][index]
    article = driver.find_elements(By.TAG_NAME, "article")[index]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", article)
    buttons = article.find_elements(By.CSS_SELECTOR, "button.word")
    button = buttons[-1]
    assert not article.find_elements(By.TAG_NAME, "canvas")
    button.click()
    canvas, image = article.find_element(By.TAG_NAME, "canvas"), article.find_element(By.TAG_NAME, "img")
    maps, part = post["maps"], content["photos"][post["photo"]][1]
    assert (
        [int(canvas.get_attribute(side)) for side in ("width", "height")] == [maps["columns"], maps["rows"]]
    )
    # On the part that the model saw.
    for side, extent, share in (("x", "width", part[0]), ("y", "height", part[1])):
        assert canvas.rect[side] == pytest.approx(image.rect[side] + share * image.rect[extent], abs=1)
        assert canvas.rect[extent] == pytest.approx(part[2 + (side == "y")] * image.rect[extent], abs=1)
    assert button.get_attribute("aria-pressed") == "true" and article.find_elements(By.CLASS_NAME, "peak")
    caption = article.find_element(By.TAG_NAME, "figcaption")
    assert button.text in caption.text and "of its attention on places" in caption.text
    others = [b for b in buttons if b.get_attribute("aria-pressed") == "true"]
    assert {b.get_attribute("value") for b in others} == {button.get_attribute("value")}
    buttons[0].click()
    assert (len(article.find_elements(By.TAG_NAME, "canvas")) == 1
            and button.get_attribute("aria-pressed") == "false")  # fmt: skip
    buttons[0].click()
    assert not article.find_elements(By.TAG_NAME, "canvas") and "Pick a word" in caption.text


def test_picked_words_show_what_they_weighed_each_phrase(chromium, data_dir, encoder_dir, tmp_path):
    path = report.main(["--run", str(train_phrases(data_dir, encoder_dir, tmp_path))])
    chromium.get(f"file://{path}")
    article, post = chromium.find_element(By.TAG_NAME, "article"), embedded(path)["posts"][0]
    items = article.find_elements(By.CSS_SELECTOR, ".phrases li")
    caption = article.find_element(By.TAG_NAME, "figcaption")
    button = article.find_elements(By.CSS_SELECTOR, "button.word")[1]
    assert [item.text for item in items] == post["phrases"] and "Pick a word" in caption.text
    button.click()
    shares = [int(item.text.removesuffix(" %").rpartition(" ")[2]) for item in items]
    assert sum(shares) == pytest.approx(100, abs=len(shares)) and min(shares) > 0
    assert [item.text.rpartition(" ")[0].rpartition(" ")[0] for item in items] == post["phrases"]
    assert f"“{button.text}”: its attention on the phrases" in caption.text
    button.click()
    assert [item.text for item in items] == post["phrases"] and "Pick a word" in caption.text
    assert chromium.get_log("browser") == [] and not article.find_elements(By.TAG_NAME, "canvas")


def test_words_can_be_picked_with_the_keyboard(page):
    driver, _ = page
    article = driver.find_element(By.TAG_NAME, "article")
    buttons = article.find_elements(By.CSS_SELECTOR, "button.word")
    assert [b.get_attribute("tabindex") for b in buttons] == ["0", *["-1"] * (len(buttons) - 1)]
    buttons[0].send_keys(Keys.ARROW_RIGHT)
    assert driver.switch_to.active_element == buttons[1]
    buttons[1].send_keys(Keys.ENTER)
    assert buttons[1].get_attribute("aria-pressed") == "true" and article.find_elements(By.TAG_NAME, "canvas")


BOXES = """
const box = node => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const inside = (a, b) => a[0] >= b[0] - 1 && a[1] >= b[1] - 1 && a[2] <= b[2] + 1 && a[3] <= b[3] + 1;
const meet = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
"""


@pytest.mark.parametrize("width", [800, 1200, 1440])
def test_nothing_is_cut_off_or_lies_over_another(page, width):
    driver, content = page
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        lost = """return [...document.querySelectorAll('#tables .scroll')]
            .map(node => node.scrollWidth - node.clientWidth)"""
        narrow = [width for width in driver.execute_script(lost) if width > 0]
        assert not narrow or driver.find_elements(By.CLASS_NAME, "long")  # of 20 relations it may scroll
        charts = BOXES + """return [...document.querySelectorAll('#curves .box')].map(chart => {
            const texts = [...chart.querySelectorAll('svg text')].map(box);
            const all = box(chart.querySelector('svg'));
            const over = texts.flatMap((a, i) => texts.slice(i + 1).filter(b => meet(a, b)));
            return [texts.every(text => inside(text, all)), over, meet(box(chart.querySelector('h3')), all)];
        })"""
        assert driver.execute_script(charts) == len(curves_of(content)) * [[True, [], False]]
        gaps = BOXES + """return [...document.querySelectorAll('.run')].flatMap(run => {
            const cells = [...run.children].map(cell => {
                const range = document.createRange();
                range.selectNodeContents(cell.querySelector('.word'));
                return box(range);
            });
            return cells.slice(1).map((b, i) => [cells[i][1] === b[1], b[0] - cells[i][2]]);
        })"""
        together = [gap for one_line, gap in driver.execute_script(gaps) if one_line]
        assert bool(together) == content["ner"]  # heads and tails are one word each here
        assert max(together, default=0) < 16  # pixels between the words of one entity
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_a_phone(page, scheme):
    driver, content = page
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        for _ in range(10):
            driver.execute_script("scrollTo(0, document.body.scrollHeight)")
            time.sleep(0.05)
        widths = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths == [360, 360]
        colours = "return ['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])"
        ink, paper = (sum(map(int, text[4:-1].split(","))) for text in driver.execute_script(colours))
        assert paper - ink > 400 if scheme == "light" else ink - paper > 400
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def curves_of(content):
    """{title: key of a log's line} of the curves of a page, in order."""
    losses = [key for key in content["log"][0] if key.startswith("loss_")]
    titles = {"training loss": "loss", "valid": "valid_main_f1"}
    titles |= {f"training loss: {key.removeprefix('loss_')}": key for key in losses}
    titles |= {"lr": "lr", "lr of fusion and head": "fusion_lr"}
    return {title: key for title, key in titles.items() if key in content["log"][0]}


def test_the_tables_and_curves_are_there(page):
    driver, content = page
    tables = driver.find_elements(By.TAG_NAME, "table")
    assert len(tables) == 4
    for table, wanted in zip(tables[:3], content["tables"], strict=True):
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
        assert [[cell.text for cell in row.find_elements(By.XPATH, "*")] for row in rows] == wanted["rows"]
    counts = [[int(cell.text) for cell in row.find_elements(By.TAG_NAME, "td")]
              for row in tables[3].find_elements(By.CSS_SELECTOR, "tbody tr")]  # fmt: skip
    assert counts == content["confusion"]["counts"]
    charts = driver.find_elements(By.TAG_NAME, "svg")
    heads = [head.text for head in driver.find_elements(By.CSS_SELECTOR, "#curves h3")]
    assert [*heads[:1], *heads[2:]] == [*curves_of(content)][:1] + [*curves_of(content)][2:]
    titles = "return [...arguments[0].querySelectorAll('circle title')].map(node => node.textContent)"
    for chart, key in zip(charts, curves_of(content).values(), strict=True):
        values = [float(text.split(": ")[1]) for text in driver.execute_script(titles, chart)]
        assert values == pytest.approx([line[key] for line in content["log"]], rel=0.01, abs=1e-4)
    best = f"kept: epoch {content['log'][-1]['best_epoch']}"
    assert all({best, "epoch"} <= set(chart.text.split("\n")) for chart in charts)
    assert content["facts"]["Data"] in driver.find_element(By.ID, "facts").text
