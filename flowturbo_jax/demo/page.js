// A second click within 0.3 s is a slip: it asks for nothing again.
() => {
  let last = -Infinity;
  document.addEventListener(
    "click",
    (event) => {
      if (!event.target.closest?.("button.primary")) return;
      if (event.timeStamp - last < 300) event.stopImmediatePropagation();
      else last = event.timeStamp;
    },
    true,
  );
};
