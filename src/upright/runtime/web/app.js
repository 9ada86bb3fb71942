// The page of `upright web`. This file runs twice: as the page, and in a worker, where the model does not block the page.
"use strict";

if (typeof document === "undefined") answerQuestions();
else showPage();

// ---- the worker ----

function answerQuestions() {
  let ort, session;
  const tasks = {
    async load({ script, wasm, model }) {
      // Import from bytes: a server may not know the type of .mjs, and a page in one file has no address for it.
      ort = await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
      ort.env.wasm.wasmBinary = wasm;
      // Several threads need headers that few servers send, and gain little for networks of a page's size.
      ort.env.wasm.numThreads = 1;
      ort.env.logLevel = "error";
      session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
      return ort.env.versions.web;
    },
    // Takes uint8 `pixels` of `shape` (B, H, W, C); returns every output as {data, shape}.
    async run({ pixels, shape }) {
      const outputs = await session.run({ images: new ort.Tensor("uint8", pixels, shape) });
      return Object.fromEntries(Object.entries(outputs).map(([name, { data, dims }]) => [name, { data, shape: dims }]));
    },
  };
  onmessage = async ({ data }) => {
    try {
      postMessage({ answer: await tasks[data.task](data) });
    } catch (error) {
      postMessage({ error: String(error.message ?? error) });
    }
  };
}

// ---- the page ----

async function showPage() {
  const MAX_PIXELS = 1024; // on the longer side; larger images do not rotate smoothly
  const ROWS = 10; // with more classes, the page lists only the five most probable ones
  const CURVES = 4;
  const STEP = 5; // degrees between the points of a curve
  const SPEED = 40; // degrees per second

  const $ = (id) => document.getElementById(id);
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const input = $("input").getContext("2d", { willReadFrequently: true });
  let about, task, worker;

  function element(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  // A screen reader reads every change, so do not write the same text again.
  function setStatus(text, kind = "") {
    if ($("state").textContent !== text) $("state").textContent = text;
    $("status").className = kind;
  }

  // -- files: in the folder of the page, or embedded in the page (--one-file)

  const embedded = (name) => $(name)?.textContent;
  const isOneFile = embedded("model.json") !== undefined;

  const downloads = new AbortController();

  async function read(name, progress = () => {}) {
    if (isOneFile) {
      const text = atob(embedded(name));
      const bytes = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
      return bytes.buffer;
    }
    const response = await fetch(name, { signal: downloads.signal });
    if (!response.ok) throw new Error(`${name} is missing (HTTP ${response.status}).`);
    const parts = [];
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) return new Blob(parts).arrayBuffer();
      parts.push(value);
      progress(value.length);
    }
  }

  // -- the worker: one task at a time

  const run = (task, transfer) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => ("error" in data ? reject(new Error(data.error)) : resolve(data.answer));
      worker.onerror = (event) => reject(new Error(event.message || "its worker cannot be started"));
      worker.postMessage(task, transfer);
    });

  async function loadModel() {
    if (typeof WebAssembly !== "object") throw new Error("this browser has no WebAssembly, or it is switched off.");
    const all = Object.values(about.bytes).reduce((sum, bytes) => sum + bytes);
    let loaded = 0;
    setStatus(`Loading ${(all / 1e6).toFixed(1)} MB …`);
    const progress = (bytes) => ($("progress").value = (loaded += bytes) / all);
    const names = [about.runtime.script, about.runtime.wasm, about.model];
    const [script, wasm, model] = await Promise.all(names.map((name) => read(name, progress)));
    setStatus("Starting the model …");
    worker = new Worker(isOneFile ? URL.createObjectURL(new Blob([embedded("app.js")])) : "app.js");
    return run({ task: "load", script, wasm, model }, [script, wasm, model]);
  }

  // -- images -> pixels, with the rules of `upright.images.decode`

  const grey = (level) => `rgb(${level}, ${level}, ${level})`;

  function blank(width, height) {
    const context = element("canvas", { width, height }).getContext("2d", { willReadFrequently: true });
    context.fillStyle = grey(about.background);
    context.fillRect(0, 0, width, height);
    return context;
  }

  // Decode without colour management. The EXIF orientation is applied.
  const decoded = (blob) => createImageBitmap(blob, { colorSpaceConversion: "none" });

  // Convert to the largest size that the model accepts, without transparency, to grey for a grey model.
  function prepared(bitmap) {
    const [, height, width] = about.shape;
    let [x, y, w, h] = [0, 0, bitmap.width, bitmap.height];
    let goal = [width, height];
    let place; // of the image on the canvas; by default all of it
    if (!height) {
      const factor = Math.min(1, MAX_PIXELS / Math.max(w, h));
      goal = [w, h].map((length) => Math.max(1, Math.round(length * factor)));
    } else if (about.resize === "crop") {
      const factor = Math.min(w / width, h / height);
      [x, y, w, h] = [(w - width * factor) / 2, (h - height * factor) / 2, width * factor, height * factor];
    } else if (about.resize === "pad") {
      const factor = Math.max(w / width, h / height);
      place = [(width - w / factor) / 2, (height - h / factor) / 2, w / factor, h / factor];
    }
    const context = blank(...goal);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, x, y, w, h, ...(place ?? [0, 0, ...goal]));
    if (about.channels === 1) {
      const imageData = context.getImageData(0, 0, ...goal);
      const { data } = imageData;
      for (let i = 0; i < data.length; i += 4) {
        // ITU-R 601, in Pillow's integers
        data.fill((data[i] * 19595 + data[i + 1] * 38470 + data[i + 2] * 7471 + 0x8000) >> 16, i, i + 3);
      }
      context.putImageData(imageData, 0, 0);
    }
    return context;
  }

  async function answer(context) {
    const { data, width, height } = context.getImageData(0, 0, context.canvas.width, context.canvas.height);
    const { channels } = about;
    const count = about.shape[0] ?? 1;
    const one = width * height * channels;
    const pixels = new Uint8Array(count * one);
    for (let i = 0, o = 0; i < data.length; i += 4) for (let c = 0; c < channels; c++) pixels[o++] = data[i + c];
    for (let n = 1; n < count; n++) pixels.copyWithin(n * one, 0, one);
    const outputs = await run({ task: "run", pixels, shape: [count, height, width, channels] }, [pixels.buffer]);
    const { data: rows, shape } = outputs[task.output];
    return { ...outputs, row: rows.slice(0, shape[1]) };
  }

  // -- the image, its angle and its size

  let image; // {context, edge}, before rotation
  let angle = 0;
  let size = 1;

  // Mean colour of the border, which fills the corners of a rotated image.
  function edgeOf(context) {
    const { width, height } = context.canvas;
    const sums = [0, 0, 0];
    let count = 0;
    for (const box of [[0, 0, width, 1], [0, height - 1, width, 1], [0, 0, 1, height], [width - 1, 0, 1, height]]) {
      const { data } = context.getImageData(...box);
      for (let i = 0; i < data.length; i += 4, count++) for (let c = 0; c < 3; c++) sums[c] += data[i + c];
    }
    return sums.map((sum) => Math.round(sum / count));
  }

  // The matrix from the image to the canvas.
  const placement = ({ width, height }, degrees) =>
    new DOMMatrix()
      .translate(width / 2, height / 2)
      .rotate(task.direction * degrees)
      .scale(size)
      .translate(-width / 2, -height / 2);

  function draw(context, degrees) {
    const { canvas } = image.context;
    const { width, height } = canvas;
    if (context.canvas.width !== width || context.canvas.height !== height) {
      Object.assign(context.canvas, { width, height });
    }
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = `rgb(${image.edge.join(", ")})`;
    context.fillRect(0, 0, width, height);
    context.setTransform(placement(canvas, degrees));
    context.drawImage(canvas, 0, 0);
    return context;
  }

  function show(context, remark = "", sample = null) {
    image = { context, edge: edgeOf(context) };
    const { width, height } = context.canvas;
    $("input").className = Math.max(width, height) > 100 ? "fine" : "";
    $("remark").textContent = remark;
    for (const button of $("samples").children) button.setAttribute("aria-pressed", button === sample);
    changed();
  }

  async function showFile(file) {
    if (!file) return;
    try {
      const bitmap = await decoded(file);
      const context = prepared(bitmap);
      const [from, to] = [bitmap, context.canvas].map(({ width, height }) => `${width} x ${height}`);
      show(context, from === to ? "" : `: ${to} of ${from} pixels`);
    } catch {
      setStatus(`This browser cannot read “${file.name}” as an image.`, "bad");
    }
  }

  function clear() {
    const [, fixedHeight, fixedWidth] = about.shape;
    const [height, width] = about.network_size;
    const factor = 280 / Math.max(height, width);
    show(
      fixedHeight ? blank(fixedWidth, fixedHeight) : blank(Math.round(width * factor), Math.round(height * factor)),
      ": draw here",
    );
    place(0, 1);
  }

  // `keepCurve`: true if the curve stays valid, because only the angle has changed.
  function changed(keepCurve = false) {
    draw(input, angle);
    stale = true;
    if (!keepCurve) {
      curve.clear();
      task.forget();
      unswept = SWEEP.slice();
      drawCurves();
    }
    wake();
  }

  function place(degrees, factor = size) {
    const keepCurve = factor === size;
    angle = degrees;
    size = factor;
    $("angle").value = angle;
    $("angle").ariaValueText = `${Math.round(angle)} degrees`;
    $("degrees").textContent = `${Math.round(angle)}°`.replace("-", "−");
    $("scale").value = Math.round(100 * size);
    $("percent").textContent = `${Math.round(100 * size)} %`;
    changed(keepCurve);
    drawCurves();
  }

  // -- tasks for the model: first the visible image, then the samples, then the curve

  const SWEEP = Array.from({ length: 360 / STEP }, (_, i) => (i % 2 ? 1 : -1) * Math.ceil(i / 2) * STEP + 0);
  const curve = new Map(); // angle -> row of the main output
  let unswept = [];
  let stale = false;
  let wake = () => {};
  const checked = { count: 0, wrong: [], largest: 0 };

  async function work() {
    const offscreen = blank(1, 1);
    for (;;) {
      try {
        if (stale) {
          stale = false;
          task.remember(input.canvas);
          showAnswer(await answer(input));
          if ($("status").className === "bad" && !checked.wrong.length) showCheck();
        } else if (checked.count < about.samples.length) {
          await checkOne(about.samples[checked.count]);
        } else if (unswept.length) {
          const degrees = unswept.shift();
          const [imageBefore, sizeBefore] = [image, size];
          const { row } = await answer(draw(offscreen, degrees));
          const isCurrent = imageBefore === image && sizeBefore === size;
          if (isCurrent && unswept.length < SWEEP.length) curve.set(degrees, row);
          drawCurves();
        } else {
          await new Promise((resolve) => (wake = resolve));
        }
      } catch (error) {
        unswept = [];
        forgetAnswer();
        const { width, height } = input.canvas;
        setStatus(`The model does not accept this image of ${width} x ${height} pixels: ${error.message}`, "bad");
      }
    }
  }

  async function checkOne(sample) {
    const { row } = await answer(prepared(await decoded(sample.blob)));
    const difference = task.difference(sample.expected, row);
    checked.count++;
    checked.largest = Math.max(checked.largest, difference);
    if (!(difference <= about.tolerance)) checked.wrong.push(sample.file);
    showCheck();
  }

  function showCheck() {
    const { count, wrong, largest } = checked;
    const total = about.samples.length;
    if (count < total) return setStatus(`Checking ${total} samples …`);
    const figures = `largest difference ${largest.toExponential(1)}, allowed ${about.tolerance.toExponential(0)}`;
    if (wrong.length) setStatus(`${wrong.length} of ${total} samples differ from the export (${figures}).`, "bad");
    else setStatus(`${total} of ${total} samples match the export (${figures}).`, "good");
  }

  // -- the answer for the visible image, and the curves

  let latest; // row of the main output
  let speaking;

  // Append a row with a bar. Return a function that changes it; `part` is the length of the bar.
  function makeRow(name) {
    const [label, bar] = ["label", "bar"].map((className) => element("span", { className }));
    const value = element("data", { className: "value" });
    const row = element("li", {}, label, bar, value);
    label.textContent = label.title = name;
    $("rows").append(row);
    return (name, part, text, colour = "var(--bar)", isFirst = false) => {
      row.classList.toggle("first", isFirst);
      label.textContent = label.title = name;
      bar.style.setProperty("--p", part);
      bar.style.setProperty("--colour", colour);
      value.value = part;
      value.textContent = text;
    };
  }

  // Remove the answer for the image before.
  function forgetAnswer() {
    latest = undefined;
    clearTimeout(speaking);
    $("spoken").textContent = "";
    $("prediction").classList.add("unknown");
    for (const canvas of $("views").querySelectorAll("canvas")) canvas.width = canvas.width;
  }

  function showAnswer(outputs) {
    latest = outputs.row;
    $("prediction").classList.remove("unknown");
    task.show(latest);
    clearTimeout(speaking);
    if (!spinning) {
      const text = task.speech(latest);
      speaking = setTimeout(() => ($("spoken").textContent = text), 500);
    }
    for (const id of about.views) showView($(id), outputs[id]);
  }

  // Draw the view of a transformer: float32 (B, H, W, C), 0 to 255.
  function showView(canvas, { data, shape: [, height, width, channels] }) {
    const imageData = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      for (let c = 0; c < 3; c++) imageData.data[4 * i + c] = data[i * channels + (channels === 3 ? c : 0)];
      imageData.data[4 * i + 3] = 255;
    }
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    canvas.getContext("2d").putImageData(imageData, 0, 0);
  }

  function path(d, className, style = "") {
    const node = document.createElementNS("http://www.w3.org/2000/svg", "path");
    node.setAttribute("d", d);
    node.setAttribute("class", className);
    node.style.stroke = style;
    return node;
  }

  function drawCurves() {
    const lines = task.lines();
    const angles = [...curve.keys()].sort((a, b) => a - b);
    const wrapped = curve.has(-180) || curve.has(180);
    const end = curve.get(180) ?? curve.get(-180);
    const points = angles.filter((at) => Math.abs(at) < 180).map((at) => [at, curve.get(at)]);
    const closed = wrapped ? [[-180, end], ...points, [180, end]] : points;
    const paths = lines.map(({ height, colour, wraps }) => {
      const heights = closed.map(([, row]) => 1 - height(row));
      const steps = closed.map(([at], i) => {
        const isBreak = i === 0 || (wraps && Math.abs(heights[i] - heights[i - 1]) > 0.5);
        return `${isBreak ? "M" : "L"}${at} ${heights[i].toFixed(4)}`;
      });
      return path(steps.join(""), "curve", colour);
    });
    $("curves").replaceChildren(
      path("M-180 0H180M-180 .5H180M-180 1H180M-90 0V1M0 0V1M90 0V1", "grid"),
      ...paths.reverse(),
      path(`M${angle} 0V1`, "now"),
    );
    $("legend").replaceChildren(
      ...lines.map(({ name, colour }) => {
        const entry = element("span", { textContent: name });
        entry.style.setProperty("--colour", colour);
        return entry;
      }),
    );
    $("share").textContent = curve.size < SWEEP.length ? "\u00a0" : task.share();
    if (latest) task.show(latest);
  }

  // -- the tasks: what a row of the main output means

  // One probability per class. With `thresholds`, an image has each class that reaches its own.
  function classification() {
    const { classes, thresholds } = about;
    const colours = new Map(); // class -> number of its colour, for the classes with a curve
    const isLong = classes.length > ROWS;
    const rows = [...classes.keys()].slice(0, isLong ? 5 : ROWS).map((k) => makeRow(isLong ? "" : classes[k]));
    $("rows").className = classes.every((name) => name.length < 4) ? "short" : "";

    const best = (probabilities) => probabilities.indexOf(Math.max(...probabilities));
    const labels = (row) =>
      thresholds ? [...classes.keys()].filter((k) => row[k] >= thresholds[k]) : [best(row)];
    const named = (row) => labels(row).map((k) => classes[k]).join(", ") || "no class";
    const colour = (k) => (colours.has(k) ? `var(--curve-${colours.get(k)})` : undefined);

    // Choose the classes with a curve: that of the upright image, which the text names, and those with the largest area.
    function chooseColours() {
      const upright = curve.size ? best(curve.get(0)) : -1;
      const top = [...classes.keys()]
        .map((k) => {
          let [sum, most] = [0, 0];
          for (const probabilities of curve.values()) {
            sum += probabilities[k];
            most = Math.max(most, probabilities[k]);
          }
          return { k, sum, most };
        })
        .filter(({ k, most }) => k === upright || most > 0.1)
        .sort((a, b) => (b.k === upright) - (a.k === upright) || b.sum - a.sum)
        .slice(0, CURVES)
        .map(({ k }) => k);
      for (const k of [...colours.keys()]) if (!top.includes(k)) colours.delete(k);
      for (const k of top) {
        if (colours.has(k)) continue;
        const numbers = [...colours.values()];
        colours.set(k, [...Array(CURVES).keys()].find((number) => !numbers.includes(number)));
      }
      return top;
    }

    return {
      output: "probabilities",
      direction: 1, // the slider rotates clockwise
      remember() {},
      forget: () => colours.clear(),
      difference: (expected, row) => Math.max(...expected.map((value, k) => Math.abs(value - row[k]))),
      speech: (row) =>
        labels(row).map((k) => `${classes[k]}, ${Math.round(100 * row[k])} percent`).join("; ") || "no class",
      lines: () => chooseColours().map((k) => ({ name: classes[k], colour: colour(k), height: (row) => row[k] })),
      show(row) {
        const order = [...classes.keys()];
        if (isLong) order.sort((a, b) => row[b] - row[a]);
        const first = labels(row);
        rows.forEach((show, i) => {
          const k = order[i];
          show(classes[k], row[k], `${(100 * row[k]).toFixed(1)} %`, colour(k), first.includes(k));
        });
      },
      // Return the range of angles with the same answer as at 0, as text.
      share() {
        const first = named(curve.get(0));
        const reach = (step) => {
          let at = 0;
          while (Math.abs(at) < 180 && named(curve.get(at + step) ?? curve.get(-at - step)) === first) at += step;
          return at;
        };
        const [low, high] = [reach(-STEP), reach(STEP)];
        const range = low === high ? "only at 0°" : `from ${low}° to ${high}°`.replaceAll("-", "−");
        const span = high - low >= 360 ? "at every angle" : range;
        return `Stays “${first}” ${span}`;
      },
    };
  }

  // The angle of the image in degrees anticlockwise, and its confidence.
  function orientation() {
    $("rotation-title").textContent = "Estimated angle by rotation angle";
    $("prediction-title").textContent = "Estimated angle, anticlockwise";
    $("angle").ariaLabel = "Angle, anticlockwise";
    $("input").ariaLabel = "The input of the model";
    $("clear").hidden = true;
    for (const tick of document.querySelectorAll(".tick")) tick.hidden = true;
    const estimate = element("p", { id: "estimate", textContent: "\u00a0" });
    $("rows").before(estimate);
    const [showConfidence, remark] = [makeRow("Confidence"), element("span")];
    const straightened = makeView("straightened", "Straightened", remark);
    const asked = blank(1, 1); // the image of the last answer

    const degrees = (value) => `${(Math.round(10 * value) / 10 + 0).toFixed(1)}°`.replace("-", "−"); // never −0
    const deviation = (value) => Math.abs(((((value + 180) % 360) + 360) % 360) - 180);
    const direction = ([angle, confidence]) =>
      [Math.cos, Math.sin].map((f) => confidence * f((angle * Math.PI) / 180));

    return {
      output: "orientation",
      direction: -1, // the slider rotates anticlockwise
      remember(canvas) {
        Object.assign(asked.canvas, { width: canvas.width, height: canvas.height });
        asked.drawImage(canvas, 0, 0);
      },
      forget() {},
      difference(expected, row) {
        const [a, b] = [direction(expected), direction(row)];
        return Math.hypot(a[0] - b[0], a[1] - b[1]);
      },
      speech([angle, confidence]) {
        const side = angle < 0 ? "clockwise" : "anticlockwise";
        return `${Math.round(Math.abs(angle))} degrees ${side}, confidence ${Math.round(100 * confidence)} percent`;
      },
      lines: () => [
        { name: "angle, −180° to 180°", colour: "var(--curve-0)", height: ([angle]) => 0.5 + angle / 360, wraps: true },
        { name: "confidence, 0 to 1", colour: "var(--curve-1)", height: ([, confidence]) => confidence },
      ],
      show([angle, confidence]) {
        estimate.textContent = degrees(angle);
        showConfidence("Confidence", confidence, confidence.toFixed(2), "var(--curve-1)");
        const isSure = confidence >= about.threshold; // else `upright straighten` does not touch the image
        remark.textContent = isSure
          ? `: rotated ${degrees(Math.abs(angle))} ${angle < 0 ? "anticlockwise" : "clockwise"}`
          : `: not rotated, because the confidence is below ${about.threshold.toFixed(2)}`;
        const { width, height } = asked.canvas;
        const side = Math.max(width, height); // an image on its side fits too
        Object.assign(straightened.canvas, { width: side, height: side });
        straightened.canvas.className = $("input").className;
        straightened.translate(side / 2, side / 2);
        if (isSure) straightened.rotate((angle * Math.PI) / 180);
        straightened.drawImage(asked.canvas, -width / 2, -height / 2);
      },
      // Return the deviation of the angles from that at 0 plus the rotation, as text.
      share() {
        const [start] = curve.get(0);
        const sizes = [...curve].map(([at, [angle]]) => deviation(angle - start - at)).sort((a, b) => a - b);
        const [middle, largest] = [sizes[sizes.length >> 1], sizes.at(-1)].map(degrees);
        return `Deviation: median ${middle}, largest ${largest}`;
      },
    };
  }

  // -- spinning

  let spinning = false;

  function spin(on) {
    spinning = on;
    $("spin").textContent = on ? "Stop" : "Spin";
    $("spin").setAttribute("aria-pressed", on);
    if (!on) return;
    let last = performance.now();
    requestAnimationFrame(function frame(now) {
      if (!spinning) return;
      // With reduced motion, show still images with pauses between them.
      if (!calm.matches || now - last > 750) {
        const next = angle + (calm.matches ? 15 : (SPEED * Math.min(now - last, 100)) / 1000);
        last = now;
        place(next > 180 ? next - 360 : next);
      }
      requestAnimationFrame(frame);
    });
  }

  // -- drawing

  function listenToPen() {
    const canvas = $("input");
    let from;
    const at = ({ clientX, clientY }) => {
      const box = canvas.getBoundingClientRect();
      const { width, height } = canvas;
      const scale = Math.min(canvas.clientWidth / width, canvas.clientHeight / height);
      const x = (clientX - box.left - box.width / 2) / scale + width / 2;
      const y = (clientY - box.top - box.height / 2) / scale + height / 2;
      return placement(canvas, angle).inverse().transformPoint({ x, y });
    };
    const stroke = (to) => {
      const { context, edge } = image;
      const { width, height } = context.canvas;
      const isDark = edge[0] + edge[1] + edge[2] < 384;
      context.strokeStyle = grey(isDark ? 255 : 0);
      context.lineWidth = Math.max(1, Math.min(width, height) / 12);
      context.lineCap = context.lineJoin = "round";
      context.beginPath();
      context.moveTo(from.x, from.y);
      context.lineTo(to.x, to.y);
      context.stroke();
      from = to;
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.preventDefault();
      canvas.setPointerCapture(event.pointerId);
      for (const button of $("samples").children) button.setAttribute("aria-pressed", false);
      from = at(event);
      stroke(from);
      changed();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!from) return;
      const events = event.getCoalescedEvents?.() ?? [];
      for (const each of events.length ? events : [event]) stroke(at(each));
      changed();
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (from = undefined));
  }

  // -- setting up the page

  function listen() {
    if (!$("clear").hidden) listenToPen();
    $("clear").onclick = clear;
    $("angle").oninput = () => (spin(false), place(Number($("angle").value)));
    $("scale").oninput = () => place(angle, Number($("scale").value) / 100);
    $("reset").onclick = () => (spin(false), place(0, 1));
    $("spin").onclick = () => spin(!spinning);
    $("file").onchange = () => showFile($("file").files[0]).then(() => ($("file").value = ""));
    addEventListener("paste", ({ clipboardData }) => showFile(clipboardData.files[0]));
    addEventListener("dragover", (event) => (event.preventDefault(), document.body.classList.add("dropping")));
    addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || document.body.classList.remove("dropping"));
    addEventListener("drop", (event) => {
      event.preventDefault();
      document.body.classList.remove("dropping");
      showFile(event.dataTransfer.files[0]);
    });
  }

  function makeView(id, caption, remark = "") {
    const [width, height] = [1, 1];
    const canvas = element("canvas", { id, width, height, role: "img", ariaLabel: caption });
    $("views").append(element("figure", {}, canvas, element("figcaption", {}, caption, remark)));
    $("views").className = $("views").children.length > 1 ? "several" : "";
    $("image").className = "with-views";
    return canvas.getContext("2d");
  }

  async function makeSamples() {
    for (const [i, sample] of about.samples.entries()) {
      sample.blob = new Blob([await read(sample.file)], { type: "image/png" });
      const label = sample.label === undefined ? "" : `, labelled ${sample.label}`;
      const name = `Sample ${i + 1}${label}`;
      const button = element("button", { type: "button", title: name, ariaLabel: name });
      button.append(element("img", { src: URL.createObjectURL(sample.blob), alt: "" }));
      button.onclick = async () => show(prepared(await decoded(sample.blob)), `: sample${label}`, button);
      $("samples").append(button);
    }
  }

  try {
    if (location.protocol === "file:" && !isOneFile) {
      throw new Error(
        "a page that is opened from a disk cannot read other files. Serve its folder " +
          "(python -m http.server, then http://localhost:8000), or write the page with --one-file.",
      );
    }
    about = JSON.parse(new TextDecoder().decode(await read("model.json")));
    task = about.task === "orientation" ? orientation() : classification();
    const { views } = about;
    views.forEach((id, i) => makeView(id, `Output of ${views.length > 1 ? `transformer ${i + 1}` : "the transformer"}`));
    drawCurves();
    await makeSamples();
    listen();
    $("samples").firstElementChild.click();
    const runtime = await loadModel();
    const { precision, upright } = about;
    $("about").textContent =
      `The model (${precision}, ${(about.bytes[about.model] / 1e6).toFixed(2)} MB) runs in this page, ` +
      `by onnxruntime-web ${runtime}; no image leaves it. Written by Upright ${upright}.`;
    $("progress").hidden = true;
    work();
  } catch (error) {
    // Stop the downloads that are in progress, so that they do not change the status.
    downloads.abort();
    $("progress").hidden = true;
    setStatus(`The model cannot be loaded: ${error.message}`, "bad");
  }
}
