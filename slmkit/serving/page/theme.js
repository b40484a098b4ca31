// The chosen theme, before the first paint. Without one, the system's holds.
try {
  const theme = localStorage.getItem("slmkit.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is off: the system's theme.
}
